"""NumPy on the CPU: computes `transformer.py` with NumPy's functions, and the threads of its BLAS."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import threadpoolctl

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, import_library
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache
from gpt_xp.memory import physical_memory
from gpt_xp.parts import ReplacedParts, replaced_parts
from gpt_xp.quantization import QuantizedNamespace
from gpt_xp.transformer import attention, gelu

QUANTIZED_FIX = install_command("quantize")

PREFILL_ROWS = 256  # rows of a product in prefill; fewer are slower, more do not fit the processor's cache
# In prefill, attention is computed for some queries and heads at a time, and GELU for some rows, so that the arrays
# between two functions stay in the processor's cache. benchmarks/results/plain-numpy.md says what each of them buys.
QUERIES, MAX_SCORES, MAX_GELU_NUMBERS = 128, 2**18, 2**17
MAX_ROWS_ONE_BY_ONE = 3  # Up to so many rows are multiplied faster one by one.
# Up to so many rows are multiplied by the token table in parts of some columns. BLAS copies the matrix, and a copy that
# fits the processor's cache is read faster. 8 rows take 0.77 of the time.
MAX_ROWS_IN_PARTS, PART_COLUMNS = 32, 2048

# The functions of a step that NumPy has exactly as the standard does.
STANDARD = (
    *("argmax", "asarray", "broadcast_to", "concat", "exp", "finfo", "int32", "log", "ones", "sqrt", "take"),
    *("tanh", "where", "zeros"),
)


class NumPy(SimpleNamespace):
    """NumPy's namespace. A function that it was not given is imported from array_api_compat on first use.

    Importing array_api_compat loads all of NumPy's submodules, which takes longer than NumPy itself.
    """

    def __getattr__(self, name: str) -> Any:
        import array_api_compat.numpy

        return getattr(array_api_compat.numpy, name)


class NumPyBackend(Backend):
    """NumPy on the CPU. `threads` limits the threads of its BLAS while gpt-xp computes."""

    name, version, device = "numpy", np.__version__, "cpu"
    needs_quantized: ClassVar = {"numba": QUANTIZED_FIX}
    samples_on_host = True
    cache_growth = 16  # It grows in most cases without a copy, and attention looks at fewer slots that are empty.

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"numpy has no device {device!r}, only cpu: take the backend cupy or jax for a GPU")
        check_dtype("numpy", "cpu", dtype, ("float32", "float64"), why=" (its half precision is slower than float32)")
        self.dtype, self.device_memory = dtype, physical_memory()
        self.xp = ReplacedParts(namespace(), parts(), same_results=True)
        self._threads, self._scope = threads, _limited(threads)
        # glibc returns blocks larger than any block freed before, up to 32 MB, to the system, which clears each page.
        # That takes 7% of the time of a prompt of 512 tokens. So a block of this size is freed; its pages are not used.
        np.empty(2**25 - 2**16, np.uint8)

    @classmethod
    def info(cls) -> BackendInfo:
        """Return NumPy's version and the CPU."""
        return BackendInfo(cls.name, cls.version, (DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory()),))

    def asarray(self, array: Any, dtype: str | None = None) -> Any:
        """Return a NumPy array in `dtype`; the array itself if it is one already."""
        return np.asarray(array, dtype=dtype)

    def to_numpy(self, array: Any) -> "np.ndarray[Any, Any]":
        """Return the array itself."""
        return np.asarray(array)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which runs with the backend's threads. NumPy compiles nothing."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # BLAS may raise floating-point flags for unused lanes of a register. The logits are checked instead.
            with np.errstate(all="ignore"), self._scope():
                return function(*args, **kwargs)

        return call

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with `n_slots` slots: the first of arrays with spare room, so that few growths copy."""

        def longer(x: Any) -> Any:
            room = with_spare_room(x)
            if room.shape[1] < n_slots:
                room = np.zeros((len(x), n_slots + n_slots // 4, x.shape[2]), x.dtype)
                room[:, : x.shape[1]] = x
            return room[:, :n_slots]

        for i, (k, v) in enumerate(cache.layers):
            cache.layers[i] = longer(k), longer(v)
        return cache

    def chunk_tokens(self, batch: int) -> int:
        """Return `PREFILL_ROWS` divided among the prompts, at least 16."""
        return max(PREFILL_ROWS // batch, 16)

    def quantized(self) -> Backend:
        """Return the backend with products compiled by Numba. Raises `BackendError` if Numba is not installed."""
        if self.dtype != "float32":
            return super().quantized()
        import_library("numba", QUANTIZED_FIX)
        from gpt_xp_backends import numpy_quantized

        blas = functools.partial(LIMITS, threadpoolctl.ThreadpoolController().select(user_api="blas"), 1)
        scope = functools.partial(numpy_quantized.numba_threads, self._threads, blas)
        xp = QuantizedNamespace(namespace(), self.dtype, numpy_quantized.product)
        compiled = numpy_quantized.compiled_parts(parts(numpy_quantized.share))
        return self.replace(xp=ReplacedParts(xp, compiled, same_results=True), _scope=scope, takes_quantized=True)

    def settings(self) -> dict[str, str]:
        """Return what is known about NumPy's BLAS."""
        found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        # Other libraries may have loaded another BLAS into the process, so NumPy's own is preferred.
        bundled = [pool for pool in found if {"numpy", "numpy.libs"} & {*Path(pool["filepath"]).parts}]
        for pool in bundled or found:
            known = {
                "blas": f"{pool['internal_api']} {pool['version']}",
                "threads": self._threads or pool["num_threads"],
                "threading": pool.get("threading_layer"),
                "cpu": pool.get("architecture"),
            }
            return {key: str(value) for key, value in known.items() if value is not None}
        # Some libraries, such as Apple's Accelerate, report nothing.
        built_with = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"blas": f"{built_with['name']} {built_with['version']}"}


def namespace() -> NumPy:
    """Return NumPy as a namespace of the standard, with short functions for everything that a step calls.

    Each weight matrix that a step reads evicts the interpreter's code and data from the processor's caches. Every line
    of Python between two products then takes several times as long as usual.
    """
    shorter = {
        "float32": np.dtype("float32"),  # Comparing an array's dtype with the class np.float32 is slower.
        "float64": np.dtype("float64"),
        "matmul": _matmul,
        "max": _reduction(np.maximum),
        "sum": _reduction(np.add),
        "mean": _mean,
        "astype": lambda x, dtype, copy=True: x.astype(dtype, copy=copy),
        "reshape": lambda x, shape: x.reshape(shape),
        "permute_dims": lambda x, axes: x.transpose(axes),
        "matrix_transpose": lambda x: x.mT,
        "arange": lambda n, dtype=None, device=None: np.arange(n, dtype=dtype),
        "full": lambda shape, value, dtype=None, device=None: np.full(shape, value, dtype=dtype),
        "clip": lambda x, min, max: np.minimum(np.maximum(x, min), max),
        "take_along_axis": _take_along_last_axis,
        "sort": _sort,
        # NumPy 2.0 has no `cumulative_sum`.
        "cumulative_sum": lambda x, axis=None, dtype=None: np.cumsum(x, axis=axis, dtype=dtype),
    }
    return NumPy(**{name: getattr(np, name) for name in STANDARD} | shorter)


def _matmul(x: Any, w: Any) -> Any:
    if x.ndim != 2 or not 1 < len(x) <= MAX_ROWS_IN_PARTS:
        return np.matmul(x, w)
    if len(x) <= MAX_ROWS_ONE_BY_ONE:  # For several rows, BLAS would first copy the matrix into another order.
        return np.matmul(x[:, None, :], w)[:, 0, :]  # [rows, 1, n_in] @ [n_in, n_out], row by row
    if w.shape[1] <= PART_COLUMNS or not w.flags.f_contiguous:
        return np.matmul(x, w)
    out = np.empty((len(x), w.shape[1]), np.result_type(x, w))
    for first in range(0, w.shape[1], PART_COLUMNS):
        np.matmul(x, w[:, first : first + PART_COLUMNS], out=out[:, first : first + PART_COLUMNS])
    return out


def _attention(share: Callable[..., None], q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
    """Compute `attention` for some queries and heads at a time, without the keys that these queries may not look at."""
    is_large = q.ndim == 4 and q.shape[2] > 1 and q.size // q.shape[3] * k.shape[2] > MAX_SCORES
    is_plain = q.shape[:2] == k.shape[:2] == v.shape[:2] and mask.shape[-3:-2] in ((), (1,))
    # A replaced softmax takes the scores of all keys.
    if not is_large or not is_plain or "softmax" in replaced_parts(xp):
        return attention(q, k, v, mask, xp)
    mixed = np.empty((*q.shape[:3], v.shape[-1]), v.dtype)

    def mix(queries: slice, heads: slice, n_keys: int) -> None:
        some = q[:, heads, queries], k[:, heads, :n_keys], v[:, heads, :n_keys], mask[..., queries, :n_keys]
        mixed[:, heads, queries] = attention(*some, xp)

    work = list[tuple[slice, slice, int]]()
    for first in range(0, q.shape[2], QUERIES):
        queries = slice(first, first + QUERIES)
        is_visible = (mask[..., queries, :] == 0).reshape(-1, mask.shape[-1]).any(axis=0)
        n_keys = mask.shape[-1] - int(is_visible[::-1].argmax())  # up to the last visible key
        n_heads = max(1, MAX_SCORES // (len(q) * QUERIES * n_keys))
        work += [(queries, slice(head, head + n_heads), n_keys) for head in range(0, q.shape[1], n_heads)]
    share(mix, work)
    return mixed


def _gelu(x: Any, xp: Any) -> Any:
    """Compute `gelu` for some rows at a time."""
    if x.ndim != 2 or x.size <= MAX_GELU_NUMBERS:
        return gelu(x, xp)
    n_rows = max(1, MAX_GELU_NUMBERS // x.shape[1])
    return np.concatenate([gelu(x[first : first + n_rows], xp) for first in range(0, len(x), n_rows)])


def _one_by_one(function: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
    for each in work:
        function(*each)


def parts(share: Callable[..., Any] = _one_by_one) -> dict[str, Callable[..., Any]]:
    """Return the parts of the model that are computed in blocks. `share(function, work)` calls it for each block."""
    return {"attention": functools.partial(_attention, share), "gelu": _gelu}


def with_spare_room(x: Any) -> Any:
    """Return the array whose first slots are `x` [n, n_slots, d_head], or `x` itself if there is none."""
    room = x.base
    begins_here = isinstance(room, np.ndarray) and room.strides == x.strides and room.ctypes.data == x.ctypes.data
    return room if begins_here and room.shape[::2] == x.shape[::2] else x


def _take_along_last_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    if axis != -1 or x.ndim != 2:
        return np.take_along_axis(x, indices, axis=axis)
    return x[np.arange(len(x))[:, None], indices]


def _mean(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    mean = np.add.reduce(x, axis=axis, keepdims=keepdims)
    mean /= x.size if axis is None else x.shape[axis]
    return mean


def _sort(x: Any, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    ordered = np.sort(x, axis=axis, stable=stable)
    return np.flip(ordered, axis) if descending else ordered


def _reduction(ufunc: np.ufunc) -> Callable[..., Any]:
    return lambda x, axis=None, dtype=None, keepdims=False: ufunc.reduce(x, axis=axis, dtype=dtype, keepdims=keepdims)


class Limits:
    """Limits BLAS threads. If limits overlap, the latest is in effect, and the last to end restores the original value.

    Otherwise two models on two Python threads would each restore the limit of the other, and leave it in effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0
        self._before: dict[str, tuple[Any, int]] = {}  # by file: a library, and its threads without limits

    @contextlib.contextmanager
    def __call__(self, controller: Any, threads: int) -> Iterator[None]:
        """Limit the threads of the controller's libraries while the context is open."""
        with self._lock:
            self._n_open += 1
            for library in controller.lib_controllers:
                self._before.setdefault(library.filepath, (library, library.num_threads))
                _set_threads(library, threads)
        try:
            yield
        finally:
            with self._lock:
                self._n_open -= 1
                while self._before and not self._n_open:
                    _set_threads(*self._before.popitem()[1])


def _set_threads(library: Any, threads: int) -> None:
    """Set the threads of a library. In threadpoolctl 3.8 only the thread that set them before may do so."""
    clear = getattr(library, "clear_controlling_thread", lambda **_: None)
    clear(force=True)
    library.set_num_threads(threads)
    clear(force=True)


LIMITS = Limits()


def _limited(threads: int | None) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a context in which BLAS has this number of threads; None changes nothing."""
    if threads is None:
        return contextlib.nullcontext
    return functools.partial(LIMITS, threadpoolctl.ThreadpoolController(), threads)
