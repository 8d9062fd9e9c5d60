"""CuPy, on CUDA GPUs. Written from its documentation and run without a GPU only: see README.

Decoding runs as a CUDA graph (see `cupy_graph`), unless `GPT_XP_CUPY_GRAPH=0`. `GPT_XP_CUPY_KERNELS` turns on what is
prepared for it, by the names in `KERNELS`, with commas between, or "all".
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, import_library, is_step, piece_on_gpu
from gpt_xp.environment import says_yes
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.types import Array
from gpt_xp_backends.capture import Trust
from gpt_xp_backends.cupy_attention import AppendingCache, Attending, attend
from gpt_xp_backends.cupy_fusion import append, fused
from gpt_xp_backends.cupy_graph import GraphedStep, KeptCache
from gpt_xp_backends.cupy_greedy import greedy
from gpt_xp_backends.cupy_kernels import split_matmul, thin_matmul
from gpt_xp_backends.jax_backend import window

# What is not measured on a GPU yet, and therefore not on by default.
KERNELS = {
    "split": "products whose sums are split over blocks (`cupy_kernels.split_matmul`)",
    "append": "bias, and the writes into the cache, in one kernel (`cupy_attention`)",
    "attention": "attention of one query in one kernel (`cupy_attention`)",
    "greedy": "the likeliest token in two kernels and one copy (`cupy_greedy`)",
}
FIX = f"{install_command('cupy-cuda13x')} (for CUDA 12: cupy-cuda12x)"
NEEDS = {"cupy": FIX}


def info() -> BackendInfo:
    """Return CuPy's version and GPUs; raises `BackendError` where it is not installed."""
    cupy = import_library("cupy", FIX)
    try:
        devices = tuple(_device_info(cupy, index) for index in range(_count(cupy)))
    except BackendError as error:
        return BackendInfo("cupy", cupy.__version__, problem=error.problem, fix=error.fix)
    return BackendInfo("cupy", cupy.__version__, devices)


def create(device: str | None = None, dtype: str = "float32", threads: int | None = None) -> Backend:
    """Return the CuPy backend on `device` ("cuda:1"; default "cuda:0")."""
    kernels = _kernels()
    cupy = import_library("cupy", FIX)
    index = _find_device(cupy, device)
    name = f"cuda:{index}"
    check_dtype("cupy", name, dtype, ("float32", "float64", "float16"))
    if threads is not None:
        raise BackendError("cupy computes on the GPU and has no threads to set: leave --threads out")
    if os.environ.get("CUPY_TF32", "0") != "0":
        raise BackendError("CUPY_TF32 makes CuPy round float32 products to 10 bits: unset it to compute in float32")
    xp = _namespace(cupy)
    trust = Trust(
        None if says_yes("GPT_XP_CUPY_GRAPH", default=True) else "GPT_XP_CUPY_GRAPH=0",
        "decoding on CuPy goes on without a CUDA graph, and slower",
        "GPT_XP_CUPY_GRAPH=0",
    )

    def asarray(array: "np.ndarray[Any, Any]", dtype: str | None = None) -> Array:
        with cupy.cuda.Device(index):
            return cupy.asarray(array, dtype=dtype)

    def peak_memory() -> int:
        with cupy.cuda.Device(index):
            return int(cupy.get_default_memory_pool().total_bytes())

    return Backend(
        name="cupy",
        version=cupy.__version__,
        device=name,
        dtype=dtype,
        xp=xp,
        asarray=asarray,
        to_numpy=cupy.asnumpy,
        compile=functools.partial(_compile, cupy, index, xp, trust, kernels),
        choose_likeliest=_on(cupy, index, greedy(cupy)) if "greedy" in kernels else None,
        synchronize=_on(cupy, index, lambda array: cupy.cuda.get_current_stream().synchronize()),
        new_cache=new_cache if trust.problem else KeptCache().new_cache,
        slots=(lambda n, n_ctx: n) if trust.problem else (lambda n, n_ctx: min(window(n), n_ctx)),
        window=(lambda n: n) if trust.problem else window,  # a graph is for one window and one cache
        piece=piece_on_gpu,
        device_memory=_device_info(cupy, index).memory,
        peak_memory=peak_memory,  # the pool never shrinks on its own, so what it holds is its peak
        settings=functools.partial(_settings, cupy, trust, kernels),
    )


def _namespace(cupy: Any) -> SimpleNamespace:
    """Return array-api-compat's CuPy with a `clip` of one launch: its own has eight, and waits for the device twice."""
    import array_api_compat.cupy as compat

    return SimpleNamespace(**vars(compat) | {"clip": cupy.clip})


def _compile(
    cupy: Any,
    index: int,
    xp: SimpleNamespace,
    trust: Trust,
    kernels: frozenset[str],
    function: Callable[..., Any],
    static: tuple[str, ...] = (),
    donate: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Return a function that runs on the device. A step of the model becomes a CUDA graph where it decodes."""
    if not is_step(function):
        return _on(cupy, index, function)
    thin = Attending(
        xp,
        split_matmul(cupy) if "split" in kernels else thin_matmul(cupy),
        fused(cupy),
        append(cupy) if "append" in kernels else None,
        attend(cupy) if "attention" in kernels else None,
    )
    cache_type = AppendingCache if "append" in kernels else KVCache
    step = GraphedStep(cupy, function, xp, thin, trust, cache_type)
    return functools.wraps(function)(_on(cupy, index, step))


def _on(cupy: Any, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function on a device, for CuPy makes new arrays on the thread's current one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with cupy.cuda.Device(index):
            return function(*args, **kwargs)

    return call


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


def _settings(cupy: Any, trust: Trust, kernels: frozenset[str]) -> dict[str, str]:
    runtime = cupy.cuda.runtime
    return {
        "driver": _version(runtime.driverGetVersion()),  # the newest CUDA that the driver can run
        "cuda": _version(runtime.runtimeGetVersion()),
        "tf32": "no",  # `create` refuses it
        "cuda_graph": trust.verdict,
        "kernels": ", ".join(name for name in KERNELS if name in kernels) or "none of those that are prepared",
        "accelerators": os.environ.get("CUPY_ACCELERATORS", "CuPy's choice"),
    }


def _version(number: int) -> str:
    """CUDA 12.4 calls itself 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"
