"""Traces a step of the model onto a tape.

`transformer.py` is called with the namespace `NativeTracer`. Products, expressions and attention become kernels, with
arrays that hold no numbers yet. What depends on the position alone is computed by NumPy while the step is traced, and
once more before each run of the tape.
"""

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.quantization import GROUP, ROUNDING_KINDS
from gpt_xp.types import Array, Namespace
from gpt_xp_backends.native_backend import attention, dots, expressions, products
from gpt_xp_backends.native_backend.machine import Target, kernels
from gpt_xp_backends.native_backend.packed import PackedWeight
from gpt_xp_backends.native_backend.tape import Tape
from gpt_xp_backends.programs import Node, Program
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer

SMALL = 2**14  # So few numbers are computed by one thread. The value is a guess, not measured.


class HostArray(np.ndarray[Any, Any]):
    """An array that NumPy has computed while a step is traced. Functions of it are noted on the tape."""

    tape: "weakref.ref[Tape] | None" = None  # A tape holds such arrays, so these must not hold it.

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Compute a function, and note it."""
        if any(isinstance(x, TracedArray) for x in inputs):
            return NotImplemented
        tape = self._tape()
        plain = [_bare(x) for x in inputs]
        result = np.asarray(getattr(ufunc, method)(*plain, **options))
        tape.host(lambda: getattr(ufunc, method)(*plain, out=result, **options))
        return host_array(result, tape)

    def __array_function__(self, *args: Any) -> Any:
        raise TypeError("NumPy's own functions are not noted: take those of the namespace")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not _shares_memory(found, self):
            raise TypeError("a copy is not noted")
        return found

    def __array_finalize__(self, other: Any) -> None:
        """Keep the tape of the array that this is a view of."""
        self.tape = getattr(other, "tape", None)

    def _tape(self) -> Tape:
        tape = self.tape() if self.tape else None
        if tape is None:
            raise TypeError("this array belongs to no tape")
        return tape


def host_array(array: Any, tape: Tape) -> HostArray:
    """Return an array whose functions are noted on the tape."""
    found = np.asarray(array).view(HostArray)
    found.tape = weakref.ref(tape)
    return found


def _shares_memory(view: Any, whole: Any) -> bool:
    return bool(np.may_share_memory(_bare(view), _bare(whole)))


def _bare(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, HostArray) else x


class NativeTracer(Tracer):
    """The namespace of a step that is traced: it adds kernels to `tape`."""

    def __init__(self, xp: Namespace, tape: Tape) -> None:
        super().__init__(xp, Calls(self._product, self._expression, None, self._attend))
        self.tape = tape

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        if callable(value) and not isinstance(value, type):
            value = self._noted(value, name)
        setattr(self, name, value)
        return value

    def _noted(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function of the namespace whose calls are noted."""

        def value(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(each, TracedArray) for each in args):
                raise TypeError(f"{name} needs numbers, and the step is traced")
            bare = [_bare(each) for each in args]
            result = plain(*bare, **kwargs)
            if not isinstance(result, np.ndarray):
                return result
            if not any(isinstance(each, np.ndarray) and _shares_memory(result, each) for each in bare):
                self.tape.host(lambda: np.copyto(result, plain(*bare, **kwargs)))
            return host_array(result, self.tape)

        return value

    def astype(self, x: Any, dtype: Any, *, copy: bool = True) -> Any:
        """Change the dtype. All traced arrays are float32."""
        if not isinstance(x, TracedArray):
            return self._noted(self._xp.astype, "astype")(x, dtype, copy=copy)
        if dtype != np.float32:
            raise TypeError("native computes in float32")
        return x

    def reshape(self, x: Any, shape: Any) -> Any:
        """Return the same numbers in another shape."""
        return (
            super().reshape(x, shape)
            if isinstance(x, TracedArray)
            else self._noted(self._xp.reshape, "reshape")(x, shape)
        )

    def view(self, x: Any, change: Callable[[Any], Any]) -> Any:
        """Return the view that `change` makes of an array; a view of an array without numbers is one, too."""
        if not isinstance(x, TracedArray):
            return change(x)
        if x._node.array is None:
            return super().view(x, change)
        array = change(x._node.array)
        if not _shares_memory(array, x._node.array):
            raise TypeError("a copy needs numbers, and the step is traced")
        return TracedArray(Node(array.shape, array.dtype, array=array), self)

    def viewed(self, node: Node, whole: Array) -> Array:
        """Return the view of an array. Raises `TypeError` for a copy: it has no numbers yet."""
        array = super().viewed(node, whole)
        if not _shares_memory(array, whole):
            raise TypeError("a copy needs numbers, and the step is traced")
        return array

    def matrix_transpose(self, x: Any) -> Any:
        """Return the transposed array, or table."""
        return self._xp.matrix_transpose(x)

    def append(self, all_k: Array, all_v: Array, position: Array, k: Any, v: Any) -> bool:
        """Write keys and values [batch, n_head, n_seq, d_head] into those of all slots."""
        k, v = self.computed(k), self.computed(v)
        batch, n_head, n_seq, d_head = k.shape
        if self.tape.cache is None or k.strides[3] != 4 or k.strides != v.strides:
            raise TypeError("keys and values lie in memory in an unusual way")
        self.tape.add(
            _kernel("put", attention.put), batch * n_head, self.tape.cache.row(all_k, all_v), k.ctypes.data,
            v.ctypes.data, *k.strides[:3], n_head, n_seq, d_head, all_k.shape[2], position.ctypes.data,
            keep=(position,), alone=k.size < SMALL,
        )  # fmt: skip
        return True

    # --- the calls ---

    def _product(self, x: Any, w: Any, scale: float) -> Any:
        if not isinstance(w, PackedWeight) or scale != 1.0 or x.strides[1] != 4:
            raise TypeError("native multiplies by packed weights")
        return product(self.tape, x, w)

    def _expression(
        self, program: Program, arrays: list[Array], shape: tuple[int, ...], reusable: frozenset[int]
    ) -> list[Array]:
        width = shape[-1]
        rows = int(np.prod(shape[:-1]))
        if any(dtype != np.float32 for dtype, _ in program.given):
            raise TypeError("native computes in float32")
        # Its text is the key: for Python, a program with the number 1.0 is equal to one with the value number 1.
        name = "expression_" + hashlib.sha256(repr(program).encode()).hexdigest()[:16]
        kernel = _kernel(name, lambda name, target: expressions.expression(name, target, program))
        places: list[int] = []
        for array in arrays:
            places += array.ctypes.data, _row_bytes(array, shape)
        outputs = []
        for number in program.outputs:
            is_row = program.operations[number - len(program.given)].is_row
            out = self.tape.arena.empty(*shape[:-1], 1 if is_row else width)
            places += out.ctypes.data, out.shape[-1] * 4
            outputs.append(out)
        kept = width * 4 * expressions.n_kept(program)
        # The arrays of the arena are not kept, because later kernels use their memory.
        keep = [array for array in arrays if not self.tape.arena.owns(array)]
        self.tape.add(
            kernel, rows, *places, width, self.tape.scratch(kept), kept, keep=keep, alone=rows * width < SMALL
        )
        return outputs

    def _attend(self, q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
        batch, n_head, n_seq, d_head = q.shape
        n_slots = k.shape[2]
        is_usual = q.strides[3] == mask.strides[-1] == 4 and mask.shape == (batch, 1, n_seq, n_slots)
        if not is_usual or self.tape.cache is None:
            raise TypeError("native attends to a cache")
        few = n_seq <= attention.MAX_FEW
        name = f"attention_{d_head}_{'few' if few else 'many'}"
        kernel = _kernel(name, lambda name, target: attention.attention(name, target, d_head, few))
        out = self.tape.arena.empty(batch, n_seq, n_head, d_head).transpose(0, 2, 1, 3)
        n_bytes = attention.scratch_bytes(kernels().target, n_seq, n_slots, d_head)
        factor = int(np.float32(1 / scale).view(np.int32))
        n_parts = batch * n_head * (1 if few else -(-n_seq // attention.BLOCK))
        self.tape.add(
            kernel, n_parts, q.ctypes.data, *q.strides[:3], self.tape.cache.row(k, v), mask.ctypes.data,
            mask.strides[0], mask.strides[2], out.ctypes.data, *out.strides[:3], n_head, n_seq, n_slots,
            self.tape.scratch(n_bytes), n_bytes, factor, keep=(mask,),
        )  # fmt: skip
        return out


def product(tape: Tape, x: Array, w: PackedWeight, out: Array | None = None) -> Array:
    """Put the product of x [rows, n_in] with a weight on the tape, and return its array [rows, n_out].

    Its memory is that of `out` [rows, whole panels], or the tape's. Raises `ValueError` for an x of another shape.
    """
    n_in, n_out = w.shape
    if x.ndim != 2 or x.shape[1] != n_in or x.strides[1] != 4:
        raise ValueError(f"x must have rows of {n_in} numbers side by side, and is {x.shape}")
    rows, (n_panels, _, columns) = len(x), w.panels.shape
    out = tape.arena.empty(rows, n_panels * columns) if out is None else out
    scales = 0 if w.scales is None else w.scales.ctypes.data
    if w.kind in ROUNDING_KINDS:
        if w.kind == "w8a8":
            each, parts, groups = dots.row_bytes(kernels().target, n_in), n_in, w.panels.shape[1] - 1
            round_kernel, kernel = _kernel("codes", dots.codes), _kernel("product_w8a8", dots.product)
        else:
            each, parts = dots.group_row_bytes(n_in), n_in // GROUP
            groups = parts
            round_kernel = _kernel("group_codes", dots.group_codes)
            kernel = _kernel("product_w4a8", dots.product_int4)
        rounded = tape.arena.empty(rows, each // 4)
        tape.add(
            round_kernel, rows, x.ctypes.data, x.strides[0], rounded.ctypes.data, each, parts, alone=x.size < SMALL
        )
        tape.add(
            kernel, n_panels, rounded.ctypes.data, each, rows, w.panels.ctypes.data, scales, out.ctypes.data,
            out.strides[0], groups, keep=(w,),
        )  # fmt: skip
        return out[:, :n_out]
    few = rows <= products.FEW_ROWS
    name = f"product_{w.kind}_{'few' if few else 'many'}"
    kernel = _kernel(name, lambda name, target: products.product(name, target, w.kind, few))
    wide = 0 if few or w.kind == "float32" else tape.scratch(n_in * columns * 4)
    tape.add(
        kernel, n_panels, x.ctypes.data, x.strides[0], rows, w.panels.ctypes.data, scales, out.ctypes.data,
        out.strides[0], n_in, wide, keep=(w,),
    )  # fmt: skip
    return out[:, :n_out]


def _row_bytes(array: Array, shape: tuple[int, ...]) -> int:
    """Return the bytes from one row of an array to the next, broadcast to `shape`. Raises `TypeError` if they vary."""
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != 4:
        raise TypeError("an array lies in memory in an unusual way")
    if array.ndim == 0 or array.size == array.shape[-1]:
        if array.ndim and array.shape[-1] not in (1, shape[-1]):
            raise TypeError("a row is too short")
        return 0
    if array.shape[:-1] != shape[:-1]:
        raise TypeError("an array lies in memory in an unusual way")
    rows = array[..., 0].reshape(-1) if array.ndim > 2 else array[:, 0]
    if not _shares_memory(rows, array):
        raise TypeError("an array lies in memory in an unusual way")
    return int(rows.strides[0])


def _kernel(name: str, make: Callable[[str, Target], str]) -> int:
    return kernels().address(name, lambda: make(name, kernels().target))
