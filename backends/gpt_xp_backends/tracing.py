"""Trace a step: find the calls that it makes, with as much work in each as possible.

A library computes `0.5 * x * (1 + tanh(...))` function by function, and each result goes to memory and comes back. In
the namespace `Tracer` the functions of single elements, the reductions over the last axis and the views return a
`TracedArray`. It has a shape and a dtype, and only knows how it will be computed. When its numbers are needed (by a
product, or by the cache), the whole expression becomes one call of `Calls.compute`. `transformer.py` knows nothing of
this. The calls of one layer are then: layer norm; product; bias; the writes into the cache; queries times keys; mask
and softmax; times values; product; bias, residual and layer norm; product; bias and GELU; product.

The calls are made in their order, as soon as they are known. A CUDA graph captures them; another runner could note them
in a list. Two calls do more at once, where a runner has them: `append` (bias and the writes) and `attend` (from queries
to the mixed values). The trace recognizes both by what the step computes, and computes anything else as it stands.
"""

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np

from gpt_xp.types import Array, Namespace
from gpt_xp_backends.programs import Compute, Node, run


@dataclass(frozen=True)
class Calls:
    """The calls that a step is made of, as a runner computes them.

    `matmul(x, w, scale)` is x / scale @ w: an array, or a list of arrays whose sum it is. `compute` computes a program.
    `append(k, v, position, *arguments of compute)` computes the queries, keys and values of one token, and writes into
    k and v [batch, n_head, n_slots, d_head] of a layer. `attend(q, k, v, mask, scale)` is
    softmax(q / scale @ k.T + mask) @ v, or None for arrays that it cannot take.
    """

    matmul: Callable[..., Any]
    compute: Compute
    append: Callable[..., list[Array]] | None = None
    attend: Callable[[Array, Array, Array, Array, float], Array | None] | None = None


class TracedArray:
    """Stands for an array of a step that is traced, as far as the model asks for one.

    Asked for its numbers it raises `TypeError`: such a step cannot be captured, and is computed as it stands.
    """

    __slots__ = ("__weakref__", "_node", "_tracer")
    __array_ufunc__ = None  # NumPy and CuPy leave `array + traced` to this class, and np.tanh(traced) fails.

    def __init__(self, node: Node, tracer: "Tracer") -> None:
        self._node, self._tracer = node, tracer
        node.handle = weakref.ref(self)

    shape = property(lambda self: self._node.shape)
    ndim = property(lambda self: len(self._node.shape))
    dtype = property(lambda self: self._node.dtype)

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError("this array stands for one of a step that is traced, and has no numbers")

    __array__ = __bool__ = __eq__ = __ne__ = _refuse  # Python's own would answer something.
    __hash__ = object.__hash__

    def __getitem__(self, index: Any) -> Any:
        return self._tracer.view(self, lambda x: x[index])

    def _with(self, function: str, other: Any) -> "TracedArray":
        return self._tracer.expression(function, self, other)

    def _after(self, function: str, other: Any) -> "TracedArray":
        return self._tracer.expression(function, other, self)

    __add__, __radd__ = functools.partialmethod(_with, "add"), functools.partialmethod(_after, "add")
    __sub__, __rsub__ = functools.partialmethod(_with, "subtract"), functools.partialmethod(_after, "subtract")
    __mul__, __rmul__ = functools.partialmethod(_with, "multiply"), functools.partialmethod(_after, "multiply")
    __truediv__, __rtruediv__ = functools.partialmethod(_with, "divide"), functools.partialmethod(_after, "divide")


class Tracer:
    """The namespace `xp` for a step that is traced: its products and expressions become `calls`."""

    def __init__(self, xp: Namespace, calls: Calls) -> None:
        self._xp, self._calls = xp, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        if callable(value) and not isinstance(value, type):  # All other functions take arrays that are computed.
            plain = value

            def value(*args: Any, **kwargs: Any) -> Any:
                return plain(*map(self.computed, args), **kwargs)

        setattr(self, name, value)  # It is found at once from now on.
        return value

    def matmul(self, x: Any, w: Any) -> TracedArray:
        """Return the product. A product of batches is not computed yet, because it may be part of attention."""
        w = self.computed(w)
        if len(w.shape) == 4:
            heads = self._attention(x._node, w) if isinstance(x, TracedArray) and self._calls.attend else None
            return self._waiting_product(x, w) if heads is None else self._private(heads)
        x = self.computed(x)
        product = self._calls.matmul(x, w, 1.0)
        if isinstance(product, list):  # arrays that are still to be added
            total = functools.reduce(functools.partial(self.expression, "add"), map(self._private, product))
            return cast(TracedArray, self.astype(total, x.dtype))
        return self._private(product)

    def _waiting_product(self, x: Any, w: Array) -> TracedArray:
        node, shape = cast(Node, _node(x)), (*x.shape[:-1], w.shape[-1])
        return TracedArray(Node(shape, node.dtype, "matmul", (node, _node(w))), self)

    def _private(self, array: Array) -> TracedArray:
        """Return an array that no other code holds as a traced one."""
        node = Node(array.shape, array.dtype, array=array)
        node.buffer_is_private = True
        return TracedArray(node, self)

    def astype(self, x: Any, dtype: Any, *, copy: bool = True) -> Any:
        """Change the dtype of a traced array when it is computed, and that of any other array at once."""
        if not isinstance(x, TracedArray):
            return self._xp.astype(x, dtype, copy=copy)
        return x if x.dtype == dtype else self.expression("astype", x, dtype=dtype)

    def mean(self, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
        """Return the mean of each row."""
        if axis != -1 or not keepdims:
            return self._xp.mean(self.computed(x), axis=axis, keepdims=keepdims)
        return self._reduced("sum", x, axis=-1, keepdims=True) / x.shape[-1]

    def _reduced(self, function: str, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
        if axis != -1 or not keepdims:
            return getattr(self._xp, function)(self.computed(x), axis=axis, keepdims=keepdims)
        return self.expression(function, x, shape=(*x.shape[:-1], 1))

    max, sum = functools.partialmethod(_reduced, "max"), functools.partialmethod(_reduced, "sum")

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return the same numbers in another shape."""
        return self.view(x, lambda each: each.reshape(shape))

    def permute_dims(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return the axes in another order."""
        return self.view(x, lambda each: each.transpose(axes))

    def view(self, x: Any, change: Callable[[Any], Any]) -> Any:
        """Return the view that `change` makes of an array. If the array is not computed yet, the view waits too."""
        if not isinstance(x, TracedArray) or x._node.array is not None:
            return change(self.computed(x))
        whole, changes = (x._node.inputs[0], x._node.changes) if x._node.function == "view" else (x._node, ())
        node = Node(change(np.empty(x.shape, bool)).shape, x.dtype, "view", (whole,))
        node.changes = (*changes, change)
        return TracedArray(node, self)

    def expression(
        self, function: str, *inputs: Any, shape: tuple[int, ...] | None = None, dtype: Any = None
    ) -> TracedArray:
        """Note a function of traced arrays, arrays and numbers."""
        nodes = tuple(map(_node, inputs))
        arrays = [node for node in nodes if isinstance(node, Node)]
        if shape is None:
            shape = np.broadcast_shapes(*(node.shape for node in arrays))
        if dtype is None:
            dtype = np.result_type(*(node.dtype for node in arrays))
        return TracedArray(Node(shape, np.dtype(dtype), function, nodes), self)

    exp, sqrt = functools.partialmethod(expression, "exp"), functools.partialmethod(expression, "sqrt")
    tanh = functools.partialmethod(expression, "tanh")

    def computed(self, x: Any) -> Any:
        """Return the array of a traced one, and anything else as it is."""
        if not isinstance(x, TracedArray):
            return x
        array = self._array(x._node)
        x._node.buffer_is_private = False  # The caller may keep it, or a view of it.
        return array

    def append(self, all_k: Array, all_v: Array, position: Array, k: Any, v: Any) -> bool:
        """Write k and v of one token into those of a layer by one call; return False where that is not possible.

        It is possible where both are views of one expression: the queries, keys and values [rows, 3 * n_head * d_head].
        """
        whole, (batch, n_head, _, d_head) = _whole(k), k.shape
        if whole is None or whole is not _whole(v) or whole.shape != (batch, 3 * n_head * d_head):
            return False
        if self._calls.append is None or not _can_append(all_k, all_v, whole.dtype):
            return False
        places = np.arange(math.prod(whole.shape)).reshape(whole.shape)
        right = places.reshape(batch, 3, n_head, 1, d_head)
        if not all(np.array_equal(x._node.viewed(places), right[:, i]) for i, x in ((1, k), (2, v))):
            return False
        self._run(whole, functools.partial(self._calls.append, all_k, all_v, position))
        return True

    def _attention(self, weights: Node, v: Array) -> Array | None:
        """Return the attention that the product of such weights with `v` is, or None where it is none."""
        match weights:
            case Node(function="astype", inputs=(Node() as inner,)):
                weights = inner
        match weights:
            case Node(
                function="divide",
                inputs=(
                    Node(
                        function="exp",
                        inputs=(Node(function="subtract", inputs=(scores, Node(function="max", inputs=(same,)))),),
                    ) as numerator,
                    Node(function="sum", inputs=(summed,)),
                ),
            ) if summed is numerator and same is scores:
                pass
            case _:
                return None
        match scores:
            case Node(function="add", inputs=(Node(function="matmul", array=None) as product, Node() as mask)):
                q, scale = _undivided(product.inputs[0])
                if mask.array is not None and self._calls.attend:
                    keys = product.inputs[1].array.swapaxes(-1, -2)
                    return self._calls.attend(self._array(q), keys, v, mask.array, scale)
        return None

    def _array(self, node: Node) -> Array:
        """Return the array of a node, which is computed if it is not yet."""
        if node.array is None and node.function == "view":
            [whole] = node.inputs
            array = self._array(whole)
            whole.buffer_is_private = False
            node.array, node.inputs = self.viewed(node, array), ()
        elif node.array is None and node.function == "matmul":
            q, scale = _undivided(node.inputs[0])
            node.array, node.inputs = self._calls.matmul(self._array(q), node.inputs[1].array, scale), ()
        elif node.array is None:
            self._run(node, self._calls.compute)
        return node.array

    def viewed(self, node: Node, whole: Array) -> Array:
        """Return the view that a node is of an array."""
        return node.viewed(whole)

    def _run(self, node: Node, compute: Compute) -> None:
        """Compute an expression, and before it the products and views below it."""
        for each in _waiting(node, []):
            self._array(each)
        run(node, compute)


def _node(x: Any) -> Node | float:
    if isinstance(x, TracedArray):
        return x._node
    return float(x) if isinstance(x, int | float) else Node(x.shape, x.dtype, array=x)


def _whole(x: Any) -> Node | None:
    """Return the expression that an array is a view of, if that is not computed."""
    if not isinstance(x, TracedArray) or x._node.function != "view" or x._node.array is not None:
        return None
    whole: Node = x._node.inputs[0]
    return whole if whole.array is None and whole.function != "matmul" else None


def _can_append(k: Array, v: Array, dtype: Any) -> bool:
    """Return whether the tokens of each head lie side by side, in keys and values alike."""
    side_by_side = k.strides[2:] == (k.shape[3] * k.itemsize, k.itemsize)
    return bool(side_by_side and k.strides == v.strides and k.dtype == v.dtype == dtype)


def _undivided(node: Node) -> tuple[Node, float]:
    """Return the dividend and the divisor of an array divided by a number. Otherwise return the node and 1."""
    match node:
        case Node(function="divide", array=None, inputs=(Node() as dividend, float() as divisor)) if (
            dividend.array is not None or dividend.function in ("view", "matmul")
        ):
            return dividend, divisor
    return node, 1.0


def _waiting(node: Node, found: list[Node]) -> list[Node]:
    """Return the products and views below a node that are not computed."""
    if node.array is None and node.function in ("matmul", "view"):
        found.append(node)
    elif node.array is None:
        for each in node.inputs:
            if isinstance(each, Node):
                _waiting(each, found)
    return found
