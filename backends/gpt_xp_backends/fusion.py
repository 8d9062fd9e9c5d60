"""Arrays that are computed late, so that a chain of elementwise functions becomes one pass over memory.

A library computes `0.5 * x * (1 + tanh(...))` function by function, and each result goes out to memory and comes back.
In the namespace `Fusing`, functions of single elements and reductions over the last axis return a `Lazy` array, which
only knows how it will be computed. Whatever needs its numbers (a product, another shape, the cache) has the whole
expression computed at once, by `compute`, which an adapter gives: one kernel, or a block that stays in the cache.

`model.py` knows nothing of this. Between two products there is then one computation: bias and GELU; mask and softmax;
bias, residual and layer norm.
"""

import collections
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from gpt_xp.types import Array, Namespace
from gpt_xp_backends.capture import StandIn


class Step(NamedTuple):
    """One function of values that are numbered: first the arrays that are given, then the results of the steps."""

    function: str  # add, subtract, multiply, divide, exp, sqrt, tanh, astype; max and sum of a row
    inputs: tuple[int | float, ...]  # int: the number of a value; float: a constant
    dtype: "np.dtype[Any]"
    is_row: bool  # one number for each row, not one for each element


class Program(NamedTuple):
    """An expression without its arrays: equal ones are compiled once."""

    given: tuple[tuple["np.dtype[Any]", bool], ...]  # dtype of each array, and whether it has one number for each row
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]  # the numbers of the values that are wanted


# (program, the arrays given, the shape that all broadcast to, those of the arrays that nobody reads later) -> outputs
Compute: TypeAlias = Callable[[Program, list[Array], tuple[int, ...], frozenset[int]], list[Array]]


class Node:
    """A value of an expression: an array, or a function of other nodes and of constants."""

    __slots__ = ("__weakref__", "array", "dtype", "function", "handle", "inputs", "is_ours", "n_uses", "shape")

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, function: str = "", inputs: tuple[Any, ...] = (), array: Any = None
    ) -> None:
        self.shape, self.dtype, self.function, self.inputs, self.array = shape, dtype, function, inputs, array
        self.is_ours = False  # whether its array is in no other hands
        self.n_uses = 0  # in how many expressions it stands, one twice in it counting twice
        for each in inputs:
            if isinstance(each, Node):
                each.n_uses += 1
        self.handle: Callable[[], Lazy | None] = lambda: None

    def is_wanted(self) -> bool:
        """Whether the model still holds it: then it is stored on the way, instead of being computed again."""
        return self.handle() is not None


class Lazy(StandIn):
    """What `model.py` sees of a node: an array of the standard, as far as the model asks for one."""

    __slots__ = ("__weakref__", "_fusing", "_node")

    def __init__(self, node: Node, fusing: "Fusing") -> None:
        self._node, self._fusing = node, fusing
        node.handle = weakref.ref(self)

    shape = property(lambda self: self._node.shape)
    ndim = property(lambda self: len(self._node.shape))
    dtype = property(lambda self: self._node.dtype)

    def __getitem__(self, index: Any) -> Array:
        return self._fusing.computed(self)[index]

    def __add__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("add", self, other)

    def __radd__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("add", other, self)

    def __sub__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("subtract", self, other)

    def __rsub__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("subtract", other, self)

    def __mul__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("multiply", self, other)

    def __rmul__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("multiply", other, self)

    def __truediv__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("divide", self, other)

    def __rtruediv__(self, other: Any) -> "Lazy":
        return self._fusing.lazy("divide", other, self)


class Fusing:
    """The namespace `xp` with lazy arrays.

    `matmul` is the product of two arrays, or a list of arrays whose sum it is; `compute` computes the rest.
    """

    def __init__(self, xp: Namespace, matmul: Callable[..., Any], compute: Compute) -> None:
        self._xp, self._matmul, self._compute = xp, matmul, compute

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        if callable(value) and not isinstance(value, type):  # any other function: of arrays that are computed
            plain = value

            def value(*args: Any, **kwargs: Any) -> Any:
                return plain(*map(self.computed, args), **kwargs)

        setattr(self, name, value)  # found at once from now on
        return value

    def matmul(self, x: Any, w: Any) -> Lazy:
        """Return the product; its array is nobody else's."""
        x = self.computed(x)
        product = self._matmul(x, self.computed(w))
        if isinstance(product, list):  # arrays that are still to be added
            total = functools.reduce(functools.partial(self.lazy, "add"), map(self._private, product))
            return cast(Lazy, self.astype(total, x.dtype))
        return self._private(product)

    def _private(self, array: Array) -> Lazy:
        """Return an array, which no other code holds, as a lazy one."""
        node = Node(array.shape, array.dtype, array=array)
        node.is_ours = True
        return Lazy(node, self)

    def exp(self, x: Any) -> Lazy:
        """e to the power of each element."""
        return self.lazy("exp", x)

    def sqrt(self, x: Any) -> Lazy:
        """The square root of each element."""
        return self.lazy("sqrt", x)

    def tanh(self, x: Any) -> Lazy:
        """The hyperbolic tangent of each element."""
        return self.lazy("tanh", x)

    def astype(self, x: Any, dtype: Any, *, copy: bool = True) -> Any:
        """Change the dtype of a lazy array when it is computed, and of any other at once."""
        if not isinstance(x, Lazy):
            return self._xp.astype(x, dtype, copy=copy)
        return x if x.dtype == dtype else self.lazy("astype", x, dtype=dtype)

    def max(self, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
        """The largest element of each row."""
        return self._reduced("max", x, axis, keepdims)

    def sum(self, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
        """The sum of each row."""
        return self._reduced("sum", x, axis, keepdims)

    def mean(self, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
        """The mean of each row."""
        if axis != -1 or not keepdims:
            return self._xp.mean(self.computed(x), axis=axis, keepdims=keepdims)
        return self.sum(x, axis=-1, keepdims=True) / x.shape[-1]

    def _reduced(self, function: str, x: Any, axis: int | None, keepdims: bool) -> Any:
        if axis != -1 or not keepdims:
            return getattr(self._xp, function)(self.computed(x), axis=axis, keepdims=keepdims)
        return self.lazy(function, x, shape=(*x.shape[:-1], 1))

    def lazy(self, function: str, *inputs: Any, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Lazy:
        """Note a function of lazy arrays, arrays and numbers."""
        nodes = tuple(map(_node, inputs))
        arrays = [node for node in nodes if type(node) is Node]
        first, last = arrays[0], arrays[-1]
        if shape is None:
            shape = first.shape if first.shape == last.shape else np.broadcast_shapes(first.shape, last.shape)
        if dtype is None:
            dtype = first.dtype if first.dtype == last.dtype else np.result_type(first.dtype, last.dtype)
        return Lazy(Node(shape, np.dtype(dtype), function, nodes), self)

    def computed(self, x: Any) -> Any:
        """Return the array of a lazy one, and anything else as it is."""
        if not isinstance(x, Lazy):
            return x
        node = x._node
        if node.array is None:
            self._run(node)
        node.is_ours = False  # whoever asks may keep it, or a view of it
        return node.array

    def _run(self, root: Node, compute: Compute | None = None) -> None:
        """Compute a node, and on the way those of the same shape that are still wanted."""
        compute = compute or self._compute
        given, steps = _sorted(root)
        number = {id(node): place for place, node in enumerate([*given, *steps])}
        shape = np.broadcast_shapes(*{node.shape for node in (*given, *steps)})
        width = shape[-1] if shape else 1

        def is_row(node: Node) -> bool:
            return width > 1 and node.shape[-1:] in ((), (1,))

        outputs = [node for node in steps if node is root or (node.is_wanted() and node.shape == shape)]
        program = Program(
            given=tuple((node.dtype, is_row(node)) for node in given),
            steps=tuple(
                Step(node.function, tuple(each if type(each) is float else number[id(each)] for each in node.inputs),
                     node.dtype, is_row(node))
                for node in steps
            ),
            outputs=tuple(number[id(node)] for node in outputs),
        )  # fmt: skip
        arrays, spare = [node.array for node in given], _spare(given, steps, outputs)
        for node, array in zip(outputs, compute(program, arrays, shape, spare), strict=True):
            node.array, node.inputs, node.is_ours = array, (), True


def _node(x: Any) -> Node | float:
    if isinstance(x, Lazy):
        return x._node
    return float(x) if isinstance(x, int | float) else Node(x.shape, x.dtype, array=x)


def _sorted(root: Node) -> tuple[list[Node], list[Node]]:
    """Return the nodes with an array below `root`, and those without: each after its inputs, once."""
    given: list[Node] = []
    steps: list[Node] = []
    _visit(root, set(), given, steps)
    return given, steps


def _visit(node: Node, seen: set[int], given: list[Node], steps: list[Node]) -> None:
    # No closure, which would hold itself, and all arrays until Python's collector comes by.
    if id(node) in seen:
        return
    seen.add(id(node))
    for each in node.inputs if node.array is None else ():
        if isinstance(each, Node):
            _visit(each, seen, given, steps)
    (steps if node.array is None else given).append(node)


def _spare(given: list[Node], steps: list[Node], outputs: list[Node]) -> frozenset[int]:
    """Return which of the given arrays nobody reads once these steps are computed: their memory may be used."""
    uses = collections.Counter(id(each) for node in steps for each in node.inputs if isinstance(each, Node))

    def is_done(node: Node) -> bool:
        return not node.is_wanted() and uses[id(node)] == node.n_uses

    if not all(is_done(node) for node in steps if node not in outputs):
        return frozenset()  # another expression computes that step again, and reads what is below it
    return frozenset(place for place, node in enumerate(given) if node.is_ours and is_done(node))
