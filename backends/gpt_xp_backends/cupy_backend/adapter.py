"""CuPy, on CUDA GPUs. Written from its documentation and run without a GPU only: see README.

Decoding runs as a CUDA graph, unless `GPT_XP_CUPY_GRAPH=0`. `GPT_XP_CUPY_KERNELS` turns on prepared kernels, by the
names in `KERNELS` with commas between, or "all".
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import (
    Backend,
    BackendInfo,
    DeviceInfo,
    check_dtype,
    chunk_tokens_on_gpu,
    few_sizes,
    import_library,
)
from gpt_xp.config import GPT2Config
from gpt_xp.environment import says_yes
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array
from gpt_xp_backends.captured_step import CapturedStep, GraphGuard
from gpt_xp_backends.cupy_backend.cache_buffers import CacheBuffers
from gpt_xp_backends.cupy_backend.kernels.attention import attend
from gpt_xp_backends.cupy_backend.kernels.greedy import greedy
from gpt_xp_backends.cupy_backend.kernels.products import split_matmul, thin_matmul
from gpt_xp_backends.cupy_backend.kernels.programs import append, fused
from gpt_xp_backends.cupy_backend.runner import CudaRunner
from gpt_xp_backends.tracing import Calls

# Kernels that are not measured on a GPU yet, and therefore not on by default.
KERNELS = {
    "split": "products whose sums are split over blocks (`kernels.products.split_matmul`)",
    "append": "bias, and the writes into the cache, in one kernel (`kernels.programs.append`)",
    "attention": "attention of one query in one kernel (`kernels.attention`)",
    "greedy": "the likeliest token in two kernels and one copy (`kernels.greedy`)",
}
FIX = f"{install_command('cupy-cuda13x')} (for CUDA 12: cupy-cuda12x)"
SWITCH = "GPT_XP_CUPY_GRAPH"


class CuPyBackend(Backend):
    """CuPy on `device` ("cuda:1"; default "cuda:0")."""

    name = "cupy"
    needs: ClassVar = {"cupy": FIX}

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        self._kernels = _kernels()
        self._cupy = cupy = import_library("cupy", FIX)
        self._index = _find_device(cupy, device)
        self.device = f"cuda:{self._index}"
        check_dtype("cupy", self.device, dtype, ("float32", "float64", "float16"))
        if threads is not None:
            raise BackendError("cupy computes on the GPU and has no threads to set: leave --threads out")
        if os.environ.get("CUPY_TF32", "0") != "0":
            raise BackendError("CUPY_TF32 makes CuPy round float32 products to 10 bits: unset it to compute in float32")
        self.version, self.dtype, self.xp = cupy.__version__, dtype, _namespace(cupy)
        self.device_memory = _device_info(cupy, self._index).memory
        off = None if says_yes(SWITCH, default=True) else f"{SWITCH}=0"
        self._guard = GraphGuard(off, "decoding on CuPy goes on without a CUDA graph, and slower", f"{SWITCH}=0")
        self._runner = CudaRunner(cupy, self.xp, _calls(cupy, self._kernels))
        self._buffers = CacheBuffers()
        if "greedy" in self._kernels:
            self.choose_likeliest = self._on_device(greedy(cupy))

    @classmethod
    def info(cls) -> BackendInfo:
        """Return CuPy's version and GPUs."""
        cupy = import_library("cupy", FIX)
        try:
            devices = tuple(_device_info(cupy, index) for index in range(_count(cupy)))
        except BackendError as error:
            return BackendInfo("cupy", cupy.__version__, problem=error.problem, fix=error.fix)
        return BackendInfo("cupy", cupy.__version__, devices)

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return a NumPy array, or one of CuPy, as one of CuPy on the device."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.asarray(array, dtype=dtype)

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of CuPy as one of NumPy."""
        found: np.ndarray[Any, Any] = self._cupy.asnumpy(array)
        return found

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which makes new arrays on the device."""
        return self._on_device(function)

    def compile_step(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which is a CUDA graph where it decodes one token of each row."""
        return functools.wraps(function)(self._on_device(CapturedStep(function, self._runner, self._guard)))

    def _on_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function on the device, for CuPy makes new arrays on the thread's current one."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._cupy.cuda.Device(self._index):
                return function(*args, **kwargs)

        return call

    def synchronize(self, array: Array) -> None:
        """Wait for the device."""
        with self._cupy.cuda.Device(self._index):
            self._cupy.cuda.get_current_stream().synchronize()

    def cache_slots(self, n_tokens: int, n_ctx: int) -> int:
        """Return one of few sizes, because each size needs another graph."""
        return super().cache_slots(n_tokens, n_ctx) if self._guard.problem else min(few_sizes(n_tokens), n_ctx)

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache, of the arrays of the last one where these are free."""
        with self._cupy.cuda.Device(self._index):
            return self._buffers.new_cache(config, like, n_slots, start, self.xp)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with more slots, in the same arrays where these have them."""
        with self._cupy.cuda.Device(self._index):
            return self._buffers.grow_cache(cache, n_slots, self.xp)

    def chunk_tokens(self, batch: int) -> int:
        """Return more tokens than on a CPU."""
        return chunk_tokens_on_gpu(batch)

    def peak_memory(self) -> int:
        """Return the memory of CuPy's pool, which never shrinks by itself, and the most that graphs had."""
        with self._cupy.cuda.Device(self._index):
            return int(self._cupy.get_default_memory_pool().total_bytes()) + self._runner.peak_bytes

    def settings(self) -> dict[str, str]:
        """Return the versions of CUDA, and what became of the graph and the prepared kernels."""
        runtime, kernels = self._cupy.cuda.runtime, [name for name in KERNELS if name in self._kernels]
        return {
            "driver": _version(runtime.driverGetVersion()),  # the newest CUDA that the driver can run
            "cuda": _version(runtime.runtimeGetVersion()),
            "tf32": "no",  # `__init__` refuses it
            "cuda_graph": self._guard.verdict,
            "kernels": ", ".join(kernels) or "none of those that are prepared",
            "accelerators": os.environ.get("CUPY_ACCELERATORS", "CuPy's choice"),
        }


def _namespace(cupy: Any) -> SimpleNamespace:
    """Return array-api-compat's CuPy with a `clip` of one launch: its own has eight, and waits for the device twice."""
    import array_api_compat.cupy as compat

    return SimpleNamespace(**vars(compat) | {"clip": cupy.clip})


def _calls(cupy: Any, kernels: frozenset[str]) -> Calls:
    """Return the calls of a step as kernels."""
    return Calls(
        split_matmul(cupy) if "split" in kernels else thin_matmul(cupy),
        fused(cupy),
        append(cupy) if "append" in kernels else None,
        attend(cupy) if "attention" in kernels else None,
    )


def _kernels() -> frozenset[str]:
    """Return the names in `GPT_XP_CUPY_KERNELS`. Raises `BackendError` for one that is not known."""
    names = os.environ.get("GPT_XP_CUPY_KERNELS", "").replace(" ", "")
    found = frozenset(KERNELS if names == "all" else filter(None, names.split(",")))
    if unknown := sorted(found - KERNELS.keys()):
        raise BackendError(
            f"GPT_XP_CUPY_KERNELS has no kernels called {unknown[0]!r}", f"take some of {', '.join(KERNELS)}, or all"
        )
    return found


def _count(cupy: Any) -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(
            f"cupy {cupy.__version__} finds no CUDA device ({error})",
            "install an NVIDIA driver, or take another backend",
        ) from None


def _find_device(cupy: Any, name: str | None) -> int:
    count = _count(cupy)
    kind, _, index = (name or "cuda:0").partition(":")
    if kind in ("cuda", "gpu") and (index or "0").isdecimal() and int(index or 0) < count:
        return int(index or 0)
    names = ", ".join(f"cuda:{i}" for i in range(count))
    raise BackendError(f"cupy has no device {name!r} here, only {names}")


def _device_info(cupy: Any, index: int) -> DeviceInfo:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return DeviceInfo(f"cuda:{index}", properties["name"].decode(), int(properties["totalGlobalMem"]))


def _version(number: int) -> str:
    """Return the name of a version of CUDA: 12.4 calls itself 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"
