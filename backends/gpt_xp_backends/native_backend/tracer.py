"""Traces a step of the model onto a tape.

`transformer.py` is called with the namespace `NativeTracer`. Products, expressions and attention become kernels, with
arrays that hold no numbers yet. What depends on the position alone is computed by NumPy while the step is traced, and
once more before each run of the tape.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.types import Array, Namespace
from gpt_xp_backends.native_backend import attention, expressions, products
from gpt_xp_backends.native_backend.machine import Target, kernels
from gpt_xp_backends.native_backend.packed import PackedWeight
from gpt_xp_backends.native_backend.tape import Tape
from gpt_xp_backends.programs import Node, Program
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer

SMALL = 2**14  # Another thread would take longer to come than so many numbers take to be computed.


class HostArray(np.ndarray[Any, Any]):
    """An array that NumPy has computed. Calls on it are noted on the tape of its tracer."""

    note: Callable[[Callable[[], Any]], None]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Compute a function, and note it."""
        plain = [x.view(np.ndarray) if isinstance(x, HostArray) else x for x in inputs]
        if any(isinstance(x, TracedArray) for x in plain):
            return NotImplemented
        result = np.asarray(getattr(ufunc, method)(*plain, **options))
        self.note(lambda: getattr(ufunc, method)(*plain, out=result, **options))
        return host_array(result, self.note)

    def __array_finalize__(self, other: Any) -> None:
        """Keep the tracer of the array that this is a view of."""
        self.note = getattr(other, "note", None)  # type: ignore[assignment]


def host_array(array: Any, note: Callable[[Callable[[], Any]], None]) -> HostArray:
    """Return an array whose calls are noted."""
    found = np.asarray(array).view(HostArray)
    found.note = note
    return found


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
            bare = [each.view(np.ndarray) if isinstance(each, HostArray) else each for each in args]
            result = plain(*bare, **kwargs)
            if not isinstance(result, np.ndarray):
                return result
            if not any(isinstance(each, np.ndarray) and np.may_share_memory(result, each) for each in bare):
                self.tape.host(lambda: np.copyto(result, plain(*bare, **kwargs)))
            return host_array(result, self.tape.host)

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
        if not np.may_share_memory(array, x._node.array):
            raise TypeError("a copy needs numbers, and the step is traced")
        return TracedArray(Node(array.shape, array.dtype, array=array), self)

    def matrix_transpose(self, x: Any) -> Any:
        """Return the transposed array, or table."""
        return self._xp.matrix_transpose(x)

    def append(self, all_k: Array, all_v: Array, position: Array, k: Any, v: Any) -> bool:
        """Write keys and values [batch, n_head, n_seq, d_head] into those of all slots."""
        k, v = self.computed(k), self.computed(v)
        batch, n_head, n_seq, d_head = k.shape
        n_slots = all_k.shape[2]
        if int(position) % n_slots + n_seq > n_slots:
            raise TypeError("these tokens do not fit the slots")  # The plain step says so in its own words.
        if self.tape.cache is None or k.strides[3] != 4 or k.strides != v.strides:
            raise TypeError("keys and values lie in memory in an unusual way")
        self.tape.add(
            _kernel("put", attention.put), self.tape.cache.row(all_k), k.ctypes.data, v.ctypes.data, *k.strides[:3],
            batch, n_head, n_seq, d_head, n_slots, position.ctypes.data, keep=(position,), alone=k.size < SMALL,
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
        kernel = _expression_kernel(program)
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
        self.tape.add(
            kernel,
            *places,
            rows,
            width,
            self.tape.scratch(kept),
            kept,
            keep=tuple(a for a in arrays if isinstance(a, HostArray)),
            alone=rows * width < SMALL,
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
        self.tape.add(
            kernel, q.ctypes.data, *q.strides[:3], self.tape.cache.row(k), mask.ctypes.data, mask.strides[0],
            mask.strides[2], out.ctypes.data, *out.strides[:3], n_head, batch, n_seq, n_slots,
            self.tape.scratch(n_bytes), n_bytes, factor, keep=(mask,),
        )  # fmt: skip
        return out


def product(tape: Tape, x: Array, w: PackedWeight) -> Array:
    """Put the product of x [rows, n_in] with a weight on the tape, and return its array [rows, n_out]."""
    (n_in, n_out), rows, columns = w.shape, len(x), w.panels.shape[2]
    few = rows <= products.FEW_ROWS
    name = f"product_{w.kind}_{'few' if few else 'many'}"
    kernel = _kernel(name, lambda name, target: products.product(name, target, w.kind, few))
    n_panels = len(w.panels)
    out = tape.arena.empty(rows, n_panels * columns)
    wide = 0 if few or w.kind == "float32" else tape.scratch(n_in * columns * 4)
    scales = 0 if w.scales is None else w.scales.ctypes.data
    tape.add(
        kernel, x.ctypes.data, x.strides[0], rows, w.panels.ctypes.data, scales, out.ctypes.data, out.strides[0],
        n_in, n_panels, wide, keep=(w,),
    )  # fmt: skip
    return out[:, :n_out]


def _row_bytes(array: Array, shape: tuple[int, ...]) -> int:
    """Return the bytes from one row of an array to the next, broadcast to `shape`. Raises `TypeError` if they vary."""
    if array.ndim == 0 or array.size == array.shape[-1]:
        if array.ndim and array.shape[-1] not in (1, shape[-1]):
            raise TypeError("a row is too short")
        return 0
    if array.shape[:-1] != shape[:-1] or (array.shape[-1] > 1 and array.strides[-1] != 4):
        raise TypeError("an array lies in memory in an unusual way")
    rows = array[..., 0].reshape(-1) if array.ndim > 2 else array[:, 0]
    if not np.may_share_memory(rows, array):
        raise TypeError("an array lies in memory in an unusual way")
    return int(rows.strides[0])


@functools.cache
def _expression_kernel(program: Program) -> int:
    if any(dtype != np.float32 for dtype, _ in program.given):
        raise TypeError("native computes in float32")
    name = "expression_" + hashlib.sha256(repr(program).encode()).hexdigest()[:16]
    return _kernel(name, lambda name, target: expressions.expression(name, target, program))


def _kernel(name: str, make: Callable[[str, Target], str]) -> int:
    return kernels().address(name, lambda: make(name, kernels().target))
