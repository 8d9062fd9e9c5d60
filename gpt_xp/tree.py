"""Functions for trees of nested dicts and lists, such as params."""

import math
from collections.abc import Callable
from typing import Any


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with `function(leaf)` for each leaf. A quantized weight is one leaf, and tuples become lists."""
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
    """Return the tree with each number that is not finite replaced by None, because JSON has no such numbers."""
    return tree_map(lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, tree)
