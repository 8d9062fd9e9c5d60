"""NumPy, on the CPU.

Steps are captured (see `numpy_blocks` and `numpy_replay`), unless `GPT_XP_NUMPY_CAPTURE=0`.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import threadpoolctl

from gpt_xp.backend import (
    Backend,
    BackendInfo,
    Compile,
    DeviceInfo,
    check_dtype,
    import_library,
    is_step,
    physical_memory,
)
from gpt_xp.environment import says_yes
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.quantization import QuantizedNamespace
from gpt_xp_backends import numpy_replay
from gpt_xp_backends.capture import Trust

QUANTIZED_FIX = install_command("quantize")
NEEDS_QUANTIZED = {"numba": QUANTIZED_FIX}

ROWS = 256  # of a product in prefill: fewer are slower to multiply, more leave the processor's cache
# Tokens of a step from which on threads gain more than Python between their blocks costs, and Numba's products lose.
# With a long cache, blocks of attention's scores also spare memory: all of them at once are the largest arrays.
MANY = {"plain": 256, "long": 96, "quantized": 96}
LONG = 512  # slots of a cache
SLOTS = 64  # of a cache: a window is a multiple of it, for with another a step is recorded anew
LATER = 8  # tokens of a row at most in a step that is recorded: the next one, and what speculation proposes
FEW = 3  # rows that are multiplied sooner one by one
# More rows than those, up to these, are multiplied by the token table part by part: BLAS copies what it multiplies by,
# and a copy that stays in the processor's cache is read sooner. With 8 rows that takes 0.77 of the time.
SEVERAL, PART = 32, 2048

# What is in NumPy as the standard has it, of that which every step calls.
STANDARD = (
    *("argmax", "asarray", "broadcast_to", "exp", "finfo", "int32", "log", "ones", "sqrt", "take"),
    *("tanh", "where", "zeros"),
)


class NumPy(SimpleNamespace):
    """NumPy's namespace; what it was not given comes from array_api_compat, when it is asked for.

    That loads every corner of NumPy, its Fortran compiler too, which takes longer than NumPy itself.
    """

    parts: ClassVar[dict[str, Any]] = {}  # no part of the model is replaced; `__getattr__` need not look for any

    def __getattr__(self, name: str) -> Any:
        import array_api_compat.numpy

        return getattr(array_api_compat.numpy, name)


def info() -> BackendInfo:
    """NumPy is always there."""
    device = DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory())
    return BackendInfo("numpy", np.__version__, (device,))


def create(device: str | None = None, dtype: str = "float32", threads: int | None = None) -> Backend:
    """Return the NumPy backend; `threads` limits those of its BLAS while gpt-xp computes."""
    if device not in (None, "cpu"):
        raise BackendError(f"numpy has no device {device!r}, only cpu: take the backend cupy or jax for a GPU")
    check_dtype("numpy", "cpu", dtype, ("float32", "float64"), why=" (its half precision is slower than float32)")
    xp = namespace()
    return Backend(
        name="numpy",
        version=np.__version__,
        device="cpu",
        dtype=dtype,
        xp=xp,
        asarray=lambda array, dtype=None: np.asarray(array, dtype=dtype),
        to_numpy=np.asarray,
        compile=_compiler(xp, threads, _limited(threads)),
        window=lambda n: -(-n // SLOTS) * SLOTS,
        piece=lambda batch: max(ROWS // batch, 16),
        samples_on_host=True,
        device_memory=physical_memory(),
        settings=lambda: _settings(threads),
        quantized=functools.partial(_quantized, threads) if dtype == "float32" else None,
    )


def namespace() -> NumPy:
    """Return NumPy as the standard has it, with the shortest way into the functions that every step calls.

    Each weight matrix that a step reads pushes the interpreter's own code and data out of the processor's caches, so
    that every line of Python between two products costs several times what it does elsewhere.
    """
    shorter = {
        "float32": np.dtype("float32"),  # compared with an array's dtype, a class is made into one first
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
        "cumulative_sum": lambda x, axis=None, dtype=None: np.cumsum(
            x, axis=axis, dtype=dtype
        ),  # NumPy 2.0 has no other
    }
    return NumPy(**{name: getattr(np, name) for name in STANDARD} | shorter)


def _matmul(x: Any, w: Any) -> Any:
    if x.ndim == w.ndim == 2 and 1 < len(x) <= SEVERAL:
        out = np.empty((len(x), w.shape[1]), np.result_type(x, w))
        _writing(x, w, out)()
        return out
    return np.matmul(x, w)


def _writing(x: Any, w: Any, out: Any) -> Callable[[], object]:
    """Return what writes the product into `out`."""
    if x.ndim == 2 and 1 < len(x) <= FEW:  # BLAS would first copy the matrix into another order
        # [rows, 1, n_in] @ [n_in, n_out], vector by vector
        return functools.partial(np.matmul, x[:, None, :], w, out[:, None, :])
    if x.ndim == 2 and FEW < len(x) <= SEVERAL and w.shape[1] > PART and w.flags.f_contiguous:
        parts = [slice(first, first + PART) for first in range(0, w.shape[1], PART)]
        calls = [functools.partial(np.matmul, x, w[:, part], out[:, part]) for part in parts]
        return lambda: [call() for call in calls]
    return functools.partial(np.matmul, x, w, out)


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
    def reduce(x: Any, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
        return ufunc.reduce(x, axis=axis, dtype=dtype, keepdims=keepdims)

    return reduce


Scope: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]


class Limits:
    """How many threads BLAS has: what it was before the first of several that overlap is put back after the last.

    Two models that run on two of Python's threads would each put back what the other had set, and so leave it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._first: dict[int, Any] = {}  # of each controller, in the order in which they came

    @contextlib.contextmanager
    def __call__(self, controller: Any, threads: int) -> Iterator[None]:
        """Limit what the controller controls, inside; where limits overlap, the latest holds."""
        with self._lock:
            self._first.setdefault(id(controller), _by_any_thread(controller, lambda: controller.limit(limits=threads)))
            self._n_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_inside -= 1
                while self._first and not self._n_inside:
                    _by_any_thread(controller, self._first.popitem()[1].restore_original_limits)

    def without(self, blas: Any) -> int:
        """Return how many threads BLAS has outside of all limits."""
        with self._lock:
            for first in self._first.values():
                return int(first.get_original_num_threads()["blas"] or 1)
            return max((each["num_threads"] for each in blas.info()), default=1)


def _by_any_thread(controller: Any, change: Callable[[], Any]) -> Any:
    """Return what `change` does: threadpoolctl 3.8 lets only the thread that set OpenBLAS's threads set them again."""
    libraries = [each for each in controller.lib_controllers if hasattr(each, "clear_controlling_thread")]
    for library in libraries:
        library.clear_controlling_thread(force=True)
    try:
        return change()
    finally:
        for library in libraries:
            library.clear_controlling_thread(force=True)


LIMITS = Limits()


def _limited(threads: int | None) -> Scope:
    """Return a scope in which BLAS has so many threads."""
    if threads is None:
        return contextlib.nullcontext
    controller = threadpoolctl.ThreadpoolController()
    return lambda: LIMITS(controller, threads)


def _compiler(xp: Any, threads: int | None, scope: Scope, writing: Any = _writing, widening: Any = None) -> Compile:
    """Return a `Backend.compile` for functions in the namespace `xp`, called inside `scope`.

    Steps of the model with many tokens are computed in blocks, on several threads; see `numpy_blocks`, which needs
    `widening` where weights are quantized. Those with few tokens of each row are recorded and played; see
    `numpy_replay`, whose products are `writing`.
    """
    trust = Trust(
        None if says_yes("GPT_XP_NUMPY_CAPTURE", default=True) else "GPT_XP_NUMPY_CAPTURE=0",
        "each step on NumPy is computed as it stands from now on, and slower",
        "GPT_XP_NUMPY_CAPTURE=0",
    )

    @functools.cache
    def in_blocks() -> tuple[Any, Any]:
        from gpt_xp_backends import fusion, numpy_blocks

        numpy_blocks.keep_freed_memory()
        blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
        pool = numpy_blocks.Threads(threads or LIMITS.without(blas))
        matmul = functools.partial(numpy_blocks.matmul, pool, widening)
        fusing = fusion.Fusing(xp, matmul, functools.partial(numpy_blocks.compute, pool))
        return fusing, blas

    def compile(
        function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        step = is_step(function)
        replayed = numpy_replay.ReplayedStep(function, writing)

        def has_many(tokens: Any, window: int) -> bool:
            return bool(tokens.size >= MANY["quantized" if widening else "long" if window >= LONG else "plain"])

        def captured(*args: Any, **kwargs: Any) -> Any:
            if has_many(args[1], kwargs["window"]):
                fusing, blas = in_blocks()
                with LIMITS(blas, 1):
                    return function(*args, **kwargs | {"xp": fusing})
            is_later = args[1].ndim == 2 and args[1].shape[1] <= LATER
            with scope():
                return replayed(*args, **kwargs) if is_later else function(*args, **kwargs)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # BLAS may raise flags for lanes of a register that hold no result. The logits are checked instead.
            with np.errstate(all="ignore"):
                failed = None
                # Another namespace that somebody put in the place of this one is used as it is.
                if step and kwargs.get("xp") is xp and not trust.problem:
                    try:
                        return captured(*args, **kwargs)
                    except Exception as error:  # whatever it is: the step can still be taken as it stands
                        failed = error
                with scope():
                    result = function(*args, **kwargs)
                if failed:  # and the step itself has not: it cannot be captured
                    trust.lose(f"{type(failed).__name__}: {failed}", failed)
                return result

        return call

    return compile


def _quantized(threads: int | None, backend: Backend) -> Backend:
    """Return the backend with products by Numba; raises `BackendError` where that is not installed."""
    numba = import_library("numba", QUANTIZED_FIX)
    from gpt_xp_backends.numpy_kernels import matmul, product, widening, writing

    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        """One pool of threads: those of Numba and of BLAS would wait for each other, a hundred times as long."""
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads or before, numba.config.NUMBA_NUM_THREADS))
        try:
            with LIMITS(blas, 1):
                yield
        finally:
            numba.set_num_threads(before)

    xp = QuantizedNamespace(NumPy(**vars(backend.xp) | {"matmul": matmul}), backend.dtype, product)
    return replace(backend, xp=xp, compile=_compiler(xp, threads, scope, writing, widening))


def _settings(threads: int | None) -> dict[str, str]:
    """Return what is known of NumPy's BLAS: other libraries may have brought one of their own into the process."""
    found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    bundled = [pool for pool in found if "numpy" in pool["filepath"]]
    for pool in bundled or found:
        known = {
            "blas": f"{pool['internal_api']} {pool['version']}",
            "threads": threads or pool["num_threads"],
            "threading": pool.get("threading_layer"),
            "cpu": pool.get("architecture"),
        }
        return {key: str(value) for key, value in known.items() if value is not None}
    # Apple's Accelerate, for one, tells nothing.
    built_with = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {"blas": f"{built_with['name']} {built_with['version']}"}
