"""MLX on CPUs, and on GPUs of Apple and NVIDIA. It was run on CPUs of Linux only so far.

MLX computes lazily. `compile` evaluates the results of each step, because a step writes into the cache of the step
before it.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, chunk_tokens_on_gpu, import_library
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache
from gpt_xp.memory import physical_memory
from gpt_xp.types import Array

FIX = f"{install_command('mlx')}, with an NVIDIA GPU also 'mlx[cuda13]' or 'mlx[cuda12]'"
DTYPES = ("float32", "bfloat16", "float16")  # With float64, MLX converts Python numbers to float32.


class MLXBackend(Backend):
    """MLX on `device` ("cpu", "gpu"; default: MLX's own)."""

    name = "mlx"
    needs: ClassVar = {"mlx": FIX}
    samples_on_host = True  # The host reads the same memory.

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        self._mx = mx = _import()
        where = _find_device(mx, device)
        self._on_cpu = where.name == "cpu"
        check_dtype("mlx", where.name, dtype, DTYPES)
        if threads is not None:
            raise BackendError("mlx has no threads to set: leave --threads out")
        if not self._on_cpu and dtype == "float32" and os.environ.get("MLX_ENABLE_TF32") != "0":
            raise BackendError(
                "mlx rounds float32 products to TF32 on some GPUs", "set MLX_ENABLE_TF32=0 before Python starts"
            )
        self._computing = functools.partial(mx.stream, _device(mx, where.name))
        self.version, self.device, self.dtype, self.xp = mx.__version__, where.name, dtype, _namespace(mx)
        self.device_memory = where.memory

    @classmethod
    def info(cls) -> BackendInfo:
        """Return MLX's version and devices."""
        mx = _import()
        return BackendInfo("mlx", mx.__version__, _devices(mx))

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return an array of NumPy or MLX as an MLX array."""
        mx = self._mx
        with self._computing():
            if isinstance(array, mx.array):
                return array.astype(getattr(mx, dtype)) if dtype else array
            array = np.ascontiguousarray(array).reshape(np.shape(array))  # It adds an axis to arrays without axes.
            return mx.array(array, dtype=getattr(mx, dtype or array.dtype.name.replace("bool", "bool_")))

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an MLX array as a NumPy array. NumPy has no bfloat16, and float32 holds it exactly."""
        return np.array(array.astype(self._mx.float32) if array.dtype == self._mx.bfloat16 else array)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which runs on the device and evaluates its results."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._computing():
                result = function(*args, **kwargs)
                self._mx.eval(result)
            return result

        return call

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache on the device."""
        with self._computing():
            return super().new_cache(config, like, n_slots, start)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with `n_slots` slots. It is evaluated layer by layer, so memory never holds two caches."""
        with self._computing():
            cache = super().grow_cache(cache, n_slots)
            for layer in cache.layers:
                self._mx.eval(layer)
            return cache

    def synchronize(self, array: Array) -> None:
        """Wait until the array is computed."""
        self._mx.eval(array)

    def chunk_tokens(self, batch: int) -> int:
        """Return the default on a CPU, and more tokens on a GPU."""
        return super().chunk_tokens(batch) if self._on_cpu else chunk_tokens_on_gpu(batch)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether MLX reports a lack of memory, by the error's message."""
        return isinstance(error, MemoryError) or "[malloc]" in str(error)

    def peak_memory(self) -> int | None:
        """Return the peak memory of the process or the GPU."""
        return super().peak_memory() if self._on_cpu else self._mx.get_peak_memory()

    def settings(self) -> dict[str, str]:
        """Return whether products may be rounded to TF32."""
        return {"tf32": os.environ.get("MLX_ENABLE_TF32", "MLX's choice")}


def _import() -> Any:
    try:
        return import_library("mlx.core", FIX)
    except ImportError as error:  # On Linux, the package `mlx` alone has no library to compute with.
        raise BackendError(f"mlx cannot be loaded ({error})", FIX) from None


def _devices(mx: Any) -> tuple[DeviceInfo, ...]:
    """Return MLX's devices, its default first."""
    found = [DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory())]
    for index in range(mx.device_count(mx.gpu) if mx.is_available(mx.gpu) else 0):
        about = mx.device_info(mx.Device(mx.gpu, index))
        name = f"gpu:{index}" if index else "gpu"
        found.append(DeviceInfo(name, about.get("device_name", "GPU"), about.get("memory_size")))
    return tuple(sorted(found, key=lambda each: _device(mx, each.name) != mx.default_device()))


def _find_device(mx: Any, name: str | None) -> DeviceInfo:
    devices = {device.name: device for device in _devices(mx)}
    name = name or next(iter(devices))
    try:
        return devices[name.removesuffix(":0")]
    except KeyError:
        raise BackendError(f"mlx has no device {name!r} here, only {', '.join(devices)}", FIX) from None


def _device(mx: Any, name: str) -> Any:
    kind, _, index = name.partition(":")
    return mx.Device(getattr(mx, kind), int(index or 0))


def _namespace(mx: Any) -> SimpleNamespace:
    """Return MLX with the standard's arguments where MLX's differ. `compile` chooses the device, not `device`."""

    def without_device(function: Callable[..., Array]) -> Callable[..., Array]:
        def call(*args: Any, device: None = None, **options: Any) -> Array:
            return function(*args, **options)

        return call

    def astype(x: Array, dtype: Any, /, *, copy: bool = True) -> Array:
        return mx.astype(x, dtype)

    def sort(x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        ordered = mx.sort(x, axis=axis)
        return mx.flip(ordered, axis) if descending else ordered

    def total(x: Array, /, *, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Array:
        return mx.sum(x if dtype is None else mx.astype(x, dtype), axis=axis, keepdims=keepdims)

    names = {name: getattr(mx, name) for name in dir(mx) if not name.startswith("_")}
    made = {name: without_device(names[name]) for name in ("arange", "asarray", "full", "ones", "zeros")}
    return SimpleNamespace(**names | made | {"astype": astype, "sort": sort, "sum": total})
