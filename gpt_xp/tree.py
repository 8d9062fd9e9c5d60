"""Trees of nested dicts and lists, such as params."""

import math
from collections.abc import Callable
from typing import Any


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same tree with `function(leaf)` in place of each leaf. A quantized weight is one leaf."""
    if isinstance(tree, dict):
        return {key: tree_map(function, branch) for key, branch in tree.items()}
    if isinstance(tree, list) or type(tree) is tuple:
        return [tree_map(function, branch) for branch in tree]
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, in order."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def finite(tree: Any) -> Any:
    """Return the same tree with None for each number that is not finite: JSON cannot hold those."""
    return tree_map(lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, tree)
