"""Make programs of the expressions of a step: a graph of nodes, of which one call computes all that wait.

When an expression is computed, nodes below it that are still referenced are stored, and not computed again.
An array that no later operation reads may be overwritten.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpt_xp.types import Array


class Operation(NamedTuple):
    """One function of numbered values: first the given arrays, then the results of the operations."""

    function: str  # add, subtract, multiply, divide, exp, sqrt, tanh, astype; max and sum of a row
    inputs: tuple[int | float, ...]  # int: the number of a value; float: a constant
    dtype: "np.dtype[Any]"
    is_row: bool  # one number for each row, not one for each element


class Program(NamedTuple):
    """An expression without its arrays: equal ones are compiled once."""

    given: tuple[tuple["np.dtype[Any]", bool], ...]  # dtype of each array, and whether it has one number for each row
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]  # the numbers of the values that are stored


# (program, given arrays, the shape that all broadcast to, places of those that no later operation reads) -> outputs
Compute: TypeAlias = Callable[[Program, list[Array], tuple[int, ...], frozenset[int]], list[Array]]


class Node:
    """A value of a step: an array, or a function of other nodes and of constants.

    The function is one of `Operation`, or "matmul" of two nodes, or "view": `changes` of the array of one node.
    """

    __slots__ = (
        *("__weakref__", "array", "buffer_is_private", "changes", "dtype", "function", "handle", "inputs", "n_uses"),
        "shape",
    )

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, function: str = "", inputs: tuple[Any, ...] = (), array: Any = None
    ) -> None:
        self.shape, self.dtype, self.function, self.inputs, self.array = shape, dtype, function, inputs, array
        self.changes: tuple[Callable[[Any], Any], ...] = ()  # One after the other they make the view of its whole.
        self.buffer_is_private = False  # whether no other code holds its array
        self.n_uses = 0  # Each expression counts it once for each of its inputs that it is.
        for each in inputs:
            if isinstance(each, Node):
                each.n_uses += 1
        self.handle: Callable[[], Any] = lambda: None  # a weak reference to the array of the model

    def is_referenced(self) -> bool:
        """Return whether the model still holds it."""
        return self.handle() is not None

    def viewed(self, whole: Any) -> Any:
        """Return the view of an array, of the shape of its whole."""
        for change in self.changes:
            whole = change(whole)
        return whole


def run(root: Node, compute: Compute) -> None:
    """Compute an expression, and store on the way the nodes of its shape that are still referenced."""
    given, operations = _sorted(root)
    number = {id(node): place for place, node in enumerate([*given, *operations])}
    shape = np.broadcast_shapes(*{node.shape for node in (*given, *operations)})
    width = shape[-1] if shape else 1

    def is_row(node: Node) -> bool:
        return width > 1 and node.shape[-1:] in ((), (1,))

    outputs = [node for node in operations if node is root or (node.is_referenced() and node.shape == shape)]
    program = Program(
        given=tuple((node.dtype, is_row(node)) for node in given),
        operations=tuple(
            Operation(node.function, tuple(each if type(each) is float else number[id(each)] for each in node.inputs),
                 node.dtype, is_row(node))
            for node in operations
        ),
        outputs=tuple(number[id(node)] for node in outputs),
    )  # fmt: skip
    arrays, reusable = [node.array for node in given], _reusable_inputs(given, operations, outputs)
    for node, array in zip(outputs, compute(program, arrays, shape, reusable), strict=True):
        node.array, node.inputs, node.buffer_is_private = array, (), True


def _sorted(root: Node) -> tuple[list[Node], list[Node]]:
    """Return the nodes with an array below `root`, and those without: each after its inputs, once."""
    given: list[Node] = []
    operations: list[Node] = []
    _visit(root, set(), given, operations)
    return given, operations


def _visit(node: Node, seen: set[int], given: list[Node], operations: list[Node]) -> None:
    # A closure would hold itself, and all arrays until Python's collector runs.
    if id(node) in seen:
        return
    seen.add(id(node))
    for each in node.inputs if node.array is None else ():
        if isinstance(each, Node):
            _visit(each, seen, given, operations)
    (operations if node.array is None else given).append(node)


def _reusable_inputs(given: list[Node], operations: list[Node], outputs: list[Node]) -> frozenset[int]:
    """Return the places of the given arrays that no later operation reads. They may be overwritten."""
    uses = collections.Counter(id(each) for node in operations for each in node.inputs if isinstance(each, Node))

    def is_done(node: Node) -> bool:
        return not node.is_referenced() and uses[id(node)] == node.n_uses

    if not all(is_done(node) for node in operations if node not in outputs):
        return frozenset()  # Another expression computes that operation again, and reads its inputs.
    return frozenset(place for place, node in enumerate(given) if node.buffer_is_private and is_done(node))
