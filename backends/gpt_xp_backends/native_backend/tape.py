"""Traces a step of the model into a list of kernels, and runs the list.

`transformer.py` is called with the namespace `NativeTracer`. Products, expressions and attention become kernels, with
arrays that hold no numbers yet. What depends on the position alone is computed by NumPy while the step is traced, and
once more before each replay.
"""

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace, Params
from gpt_xp_backends.captured_step import TracedCache
from gpt_xp_backends.native_backend import attention, expressions, products, threads
from gpt_xp_backends.native_backend.builder import F32, I32, I64, KernelBuilder, Value
from gpt_xp_backends.native_backend.machine import kernels, numbers
from gpt_xp_backends.native_backend.packed import PackedWeight
from gpt_xp_backends.programs import Node, Program
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer

SMALL = 2**14  # Another thread would take longer to come than so many numbers take to be computed.
ALIGNMENT = 64  # bytes of a line of the processor's cache


class NotTracedError(Exception):
    """This step cannot be a tape, and is computed as it stands."""


class Arena:
    """Memory for the arrays of a step. The memory of an array that no code holds is used again by a later kernel."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}

    def empty(self, *shape: int) -> "np.ndarray[Any, Any]":
        """Return a float32 array."""
        n_bytes = -(-4 * int(np.prod(shape)) // 4096) * 4096
        free = self._free.setdefault(n_bytes, [])
        block = free.pop() if free else np.empty(n_bytes + ALIGNMENT, np.uint8)
        begin = -block.ctypes.data % ALIGNMENT
        owner = np.frombuffer(memoryview(block)[begin : begin + n_bytes], np.float32)  # the base of all views
        weakref.finalize(owner, free.append, block).atexit = False
        return owner[: int(np.prod(shape))].reshape(shape)


class Tape:
    """Kernels in their order, with their arguments; and NumPy's calls, which come before them."""

    def __init__(self, arena: Arena, n_threads: int, cache: KVCache | None = None) -> None:
        self.arena, self.n_threads, self.cache = arena, n_threads, cache and CacheTable(cache)
        self._host: list[Callable[[], Any]] = []
        self._kernels: list[tuple[int, int, bool]] = []
        self._kept: list[Any] = []
        self._calls: threads.Calls | None = None
        self._memory: dict[str, Any] = {}

    def host(self, call: Callable[[], Any]) -> None:
        """Note a call of NumPy that has been made."""
        self._host.append(call)

    def add(self, kernel: int, *arguments: int, keep: tuple[Any, ...] = (), alone: bool = False) -> None:
        """Add a kernel. It is run by one thread `alone` where it is too small to share."""
        array = numbers(*arguments)
        self._kernels.append((kernel, array.ctypes.data, alone))
        self._kept += (array, *keep)

    def scratch(self, bytes_each: int) -> int:
        """Return the address of memory with that many bytes for each thread. Every kernel may use it anew."""
        n_bytes = bytes_each * self.n_threads + ALIGNMENT
        block = self._memory.get("scratch")
        if block is None or block.nbytes < n_bytes:
            block = self._memory["scratch"] = np.empty(n_bytes, np.uint8)
            self._kept.append(block)
        return int(block.ctypes.data + -block.ctypes.data % ALIGNMENT)

    def run(self) -> None:
        """Run all calls."""
        for call in self._host:
            call()
        self._calls = self._calls or threads.Calls(self._kernels)
        self._calls.run(self.n_threads)


class CacheTable:
    """Where the keys and values of each layer are. Kernels read it, so a tape serves any cache of the same shapes."""

    def __init__(self, cache: KVCache) -> None:
        self.numbers = np.empty((len(cache.layers), 3), np.int64)  # of keys, of values, bytes of a head
        self._arrays: list[Any] = []
        self.bind(cache)
        self._rows = {int(row[0]): row.ctypes.data for row in self.numbers}

    def bind(self, cache: KVCache) -> None:
        """Take the arrays of a cache. Raises `NotTracedError` where they lie in memory in an unusual way."""
        arrays = [x for layer in cache.layers for x in layer]
        if self._arrays and all(before() is x for before, x in zip(self._arrays, arrays, strict=True)):
            return
        for row, (k, v) in zip(self.numbers, cache.layers, strict=True):
            if (
                not k.strides == v.strides
                or k.strides[1:] != (4 * k.shape[2], 4)
                or not k.dtype == v.dtype == np.float32
            ):
                raise NotTracedError("the cache lies in memory in an unusual way")
            row[:] = k.ctypes.data, v.ctypes.data, k.strides[0]
        self._arrays = [weakref.ref(x) for x in arrays]

    def row(self, k: Array) -> int:
        """Return the address of the numbers of a layer, which is found by its keys."""
        return self._rows[k.ctypes.data]


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
            return host_array(result, lambda call: self.tape.host(call))

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
            _kernel("put", put), self.tape.cache.row(all_k), k.ctypes.data, v.ctypes.data, *k.strides[:3], batch, n_head,
            n_seq, d_head, n_slots, position.ctypes.data, keep=(position,), alone=k.size < SMALL,
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
    """Return the bytes from one row of an array to the next, broadcast to `shape`. Raises `TypeError` if they differ."""
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


def _kernel(name: str, make: Callable[[str, Any], str]) -> int:
    return kernels().address(name, lambda: make(name, kernels().target))


def put(name: str, target: Any) -> str:
    """Return a kernel that writes the keys and values of new tokens into their slots.

    Its arguments: the layer's numbers in the `CacheTable`; the new keys; the new values; the bytes of their batch, head
    and token; batch; heads; tokens; numbers of a head; slots; the address of the position, an int32.
    """
    k = KernelBuilder(name, target)
    layer, keys, values, batch_bytes, head_bytes, row_bytes, batch, n_head, n_seq, d_head, n_slots, place = k.arguments(
        12
    )
    first = Value(k, k.ir.sext(k.load(place, I32).ir, I64)) % n_slots
    slots_bytes = k.load(layer + 16, I64)
    with k.shared_loop(batch * n_head) as item:
        source = item // n_head * batch_bytes + item % n_head * head_bytes
        begin = item * slots_bytes + first * d_head * 4
        for which, new in enumerate((keys, values)):
            slots = k.load(layer + 8 * which, I64) + begin
            with k.loop(0, n_seq) as i, k.loop(0, d_head) as j:
                k.store(k.load(new + source + i * row_bytes + j * 4, F32), slots + (i * d_head + j) * 4)
    return k.text()


MAX_TAPES = 16  # of a step, for tokens of different shapes


class NativeStep:
    """`function(params, tokens, cache, ..., xp)`, traced for each shape of its arguments, and run by kernels.

    What cannot be traced is computed by `plain`, the same function. `problem` then says why.
    """

    def __init__(self, function: Callable[..., Any], plain: Callable[..., Any], runner: "Runner") -> None:
        self._function, self._plain, self._runner = function, plain, runner
        self._names = tuple(inspect.signature(function).parameters)
        self._traced: dict[Any, TracedStep] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return the result of the function."""
        given = dict(zip(self._names, args, strict=False)) | options
        params, tokens, cache, xp = (given.pop(name) for name in ("params", "tokens", "cache", "xp"))
        # Other namespaces replace parts of the model.
        if xp is not self._runner.xp or cache is None or not isinstance(cache.position, int):
            return self._plain(*args, **options)
        key = id(params), tokens.shape, cache.n_slots, tuple(sorted(given.items()))
        with threads.LOCK:
            step = self._traced.pop(key, None)
            try:
                if step is None:
                    step = TracedStep(self._function, params, tokens, cache, given, self._runner)
                found = step.run(tokens, cache)
            except NotTracedError as error:
                self._runner.problem = str(error)
                return self._plain(*args, **options)
            self._traced[key] = step  # The latest is the last.
            if len(self._traced) > MAX_TAPES:
                del self._traced[next(iter(self._traced))]
            return found


class Runner:
    """What all steps of a backend share: its namespace, memory, number of threads; and why a step was not traced."""

    def __init__(self, xp: Namespace, n_threads: int) -> None:
        self.xp, self.arena, self.n_threads, self.problem = xp, Arena(), n_threads, ""


class TracedStep:
    """A step for tokens and a cache of certain shapes, as a tape."""

    def __init__(
        self, function: Callable[..., Any], params: Params, tokens: Array, cache: KVCache, others: Any, runner: Runner
    ) -> None:
        self._params = params  # Its id is a key.
        self._tokens, self._start = np.array(tokens), np.array(cache.start)
        self._position = np.full((), cache.position, np.int32)
        self._tape = Tape(runner.arena, runner.n_threads, cache)
        own, tracer = TracedCache(cache.layers, self._position, self._start), NativeTracer(runner.xp, self._tape)
        try:
            found = function(params=params, tokens=self._tokens, cache=own, xp=tracer, **others)
        except TypeError as error:  # of a `TracedArray`, or of NumPy, which was given one
            raise NotTracedError(str(error)) from error
        self._result = _computed(found, tracer, cache.position)

    def run(self, tokens: Array, cache: KVCache) -> Any:
        """Run the step for tokens and a cache of the same shapes."""
        assert self._tape.cache is not None
        self._tape.cache.bind(cache)
        self._tokens[...], self._start[...] = tokens, cache.start
        self._position.fill(cache.position)
        self._tape.run()
        return _result(self._result, cache)


class _Advanced(NamedTuple):
    """Stands for the cache in a result: the one that was passed, with so many tokens more."""

    n_tokens: int


def _computed(tree: Any, tracer: NativeTracer, position: int) -> Any:
    if isinstance(tree, TracedArray):
        return tracer.computed(tree)
    if isinstance(tree, KVCache):
        return _Advanced(int(tree.position) - position)
    if isinstance(tree, list | tuple):
        return type(tree)(_computed(each, tracer, position) for each in tree)
    raise NotTracedError(f"a step returns {type(tree).__name__}")


def _result(tree: Any, cache: KVCache) -> Any:
    if isinstance(tree, _Advanced):
        return KVCache(cache.layers, cache.position + tree.n_tokens, cache.start)
    if isinstance(tree, list | tuple):
        return type(tree)(_result(each, cache) for each in tree)
    return tree.copy()  # The next run writes into it.
