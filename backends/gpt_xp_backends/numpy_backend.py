"""NumPy, on the CPU."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy
import numpy as np
import threadpoolctl

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, import_library, physical_memory
from gpt_xp.errors import BackendError
from gpt_xp.quantization import QuantizedNamespace

QUANTIZED_FIX = "pip install 'gpt-xp[quantize]'"


def info() -> BackendInfo:
    """NumPy is always there."""
    device = DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory())
    return BackendInfo("numpy", np.__version__, (device,))


def create(device: str | None = None, dtype: str = "float32", threads: int | None = None) -> Backend:
    """Return the NumPy backend; `threads` limits those of its BLAS while gpt-xp computes."""
    if device not in (None, "cpu"):
        raise BackendError(f"numpy has no device {device!r}, only cpu: take the backend cupy or jax for a GPU")
    check_dtype("numpy", "cpu", dtype, ("float32", "float64"), why=" (its half precision is slower than float32)")
    return Backend(
        name="numpy",
        version=np.__version__,
        device="cpu",
        dtype=dtype,
        xp=namespace(),
        asarray=lambda array, dtype=None: np.asarray(array, dtype=dtype),
        to_numpy=np.asarray,
        compile=_within_threads(threads),
        device_memory=physical_memory(),
        settings=lambda: _settings(threads),
        quantized=functools.partial(_quantized, threads) if dtype == "float32" else None,
    )


def namespace() -> SimpleNamespace:
    """Return NumPy as the standard has it, with the shortest way into the functions that every step calls.

    Each weight matrix that a step reads pushes the interpreter's own code and data out of the processor's caches, so
    that every line of Python between two products costs several times what it does elsewhere.
    """
    shorter = {
        "matmul": np.matmul,
        "max": _reduction(np.maximum),
        "sum": _reduction(np.add),
        "mean": _mean,
        "astype": lambda x, dtype, copy=True: x.astype(dtype, copy=copy),
        "reshape": lambda x, shape: x.reshape(shape),
        "permute_dims": lambda x, axes: x.transpose(axes),
        "matrix_transpose": lambda x: x.mT,
    }
    return SimpleNamespace(**vars(array_api_compat.numpy) | shorter)


def _mean(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    return np.add.reduce(x, axis=axis, keepdims=keepdims) / (x.size if axis is None else x.shape[axis])


def _reduction(ufunc: np.ufunc) -> Callable[..., Any]:
    def reduce(x: Any, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
        return ufunc.reduce(x, axis=axis, dtype=dtype, keepdims=keepdims)

    return reduce


def _within_threads(threads: int | None) -> Callable[..., Callable[..., Any]]:
    if threads is None:
        return lambda function, static=(), donate=(): function
    controller = threadpoolctl.ThreadpoolController()
    return _within(lambda: controller.limit(limits=threads))


def _within(scope: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[..., Callable[..., Any]]:
    def compile(
        function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with scope():
                return function(*args, **kwargs)

        return scoped

    return compile


def _quantized(threads: int | None, backend: Backend) -> Backend:
    """Return the backend with products by Numba; raises `BackendError` where that is not installed."""
    numba = import_library("numba", QUANTIZED_FIX)
    from gpt_xp_backends.numpy_kernels import product

    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        """One pool of threads: those of Numba and of BLAS would wait for each other, a hundred times as long."""
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads or before, numba.config.NUMBA_NUM_THREADS))
        try:
            with blas.limit(limits=1):
                yield
        finally:
            numba.set_num_threads(before)

    return replace(backend, xp=QuantizedNamespace(backend.xp, backend.dtype, product), compile=_within(scope))


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
