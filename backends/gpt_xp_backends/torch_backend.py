"""PyTorch, on CPUs, on GPUs of NVIDIA and AMD (cuda) and of Apple (mps). Run on CPUs only so far: see README.

On the CPU, params that are mapped from a file stay mapped. PyTorch knows no read-only memory, and the process dies
where one of these is written to in place: clone it first.

`GPT_XP_TORCH_COMPILE=1` compiles every step by `torch.compile`, which wants a C++ compiler (on CUDA, Triton) and takes
half a minute or more at the start of each process; the statistics count that as prefill and decode.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpt_xp.backend import (
    Backend,
    BackendInfo,
    DeviceInfo,
    check_dtype,
    import_library,
    peak_process_memory,
    physical_memory,
    piece_on_gpu,
)
from gpt_xp.environment import says_yes
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.types import Array

FIX = install_command("torch")
NEEDS = {"torch": FIX}
GPU_FIX = "https://pytorch.org/get-started/locally says which build of PyTorch finds which GPU"
DTYPES = {
    "cpu": ("float32", "float64", "bfloat16", "float16"),
    "cuda": ("float32", "float64", "bfloat16", "float16"),
    "mps": ("float32", "bfloat16", "float16"),
}


def info() -> BackendInfo:
    """Return PyTorch's version and devices; raises `BackendError` where it is not installed."""
    torch = import_library("torch", FIX)
    return BackendInfo("torch", torch.__version__, _devices(torch))


def _devices(torch: Any) -> tuple[DeviceInfo, ...]:
    found = [DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(DeviceInfo(f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(DeviceInfo("mps", "Apple GPU", torch.mps.recommended_max_memory()))
    return tuple(found)


def create(device: str | None = None, dtype: str = "float32", threads: int | None = None) -> Backend:
    """Return the PyTorch backend on `device` ("cuda:1", "mps"; default: where PyTorch itself makes arrays, the CPU).

    `threads` limits those of the CPU while gpt-xp computes.
    """
    torch = import_library("torch", FIX)
    where = _find_device(torch, device)
    kind = where.name.partition(":")[0]
    check_dtype("torch", where.name, dtype, DTYPES[kind])
    if threads is not None and kind != "cpu":
        raise BackendError(f"torch computes on {where.name} and has no threads to set there: leave --threads out")
    compiled = says_yes("GPT_XP_TORCH_COMPILE")
    scope = functools.partial(_scope, torch, kind, threads)

    def asarray(array: Any, dtype: str | None = None) -> Array:
        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(_unmarked(array))
        return tensor.to(device=where.name, dtype=getattr(torch, dtype) if dtype else None)

    return Backend(
        name="torch",
        version=torch.__version__,
        device=where.name,
        dtype=dtype,
        xp=_namespace(torch),
        asarray=asarray,
        to_numpy=lambda tensor: tensor.numpy(force=True),
        compile=functools.partial(_compile, scope, torch.compile if compiled else None),
        synchronize=lambda tensor: None if kind == "cpu" else getattr(torch, kind).synchronize(),
        piece=Backend.piece if kind == "cpu" else piece_on_gpu,
        samples_on_host=kind == "cpu",  # PyTorch sorts a vocabulary there in 4 to 8 ms, NumPy in 0.3
        is_out_of_memory=functools.partial(_is_out_of_memory, torch),
        device_memory=where.memory,
        peak_memory=functools.partial(_peak_memory, torch, where.name),
        settings=functools.partial(_settings, torch, kind, scope, compiled),
    )


def _find_device(torch: Any, name: str | None) -> DeviceInfo:
    """Return the device called "cuda:1"; "cuda" is the first of its kind, and "gpu" the first of any kind."""
    devices = {device.name: device for device in _devices(torch)}
    gpus = [each for each in devices if each != "cpu"]
    aliases = {"cuda": "cuda:0", "mps:0": "mps", "gpu": gpus[0] if gpus else "gpu"}
    name = name or str(torch.get_default_device())
    try:
        return devices[aliases.get(name, name)]
    except KeyError:
        raise BackendError(f"torch has no device {name!r} here, only {', '.join(devices)}", GPU_FIX) from None


def _unmarked(array: Any) -> "np.ndarray[Any, Any]":
    """Return the same memory without the mark that it is read-only, which PyTorch would warn of."""
    array = np.asarray(array, order="C")
    interface = array.__array_interface__
    unmarked = SimpleNamespace(__array_interface__=interface | {"data": (interface["data"][0], False)}, owner=array)
    return array if array.flags.writeable else np.asarray(unmarked)


def _namespace(torch: Any) -> SimpleNamespace:
    """Return array-api-compat's PyTorch, in which indices must be int64 where the standard allows any integers."""
    import array_api_compat.torch as compat

    def take_along_axis(x: Array, indices: Array, /, *, axis: int = -1) -> Array:
        return compat.take_along_axis(x, indices.to(torch.int64), axis=axis)

    return SimpleNamespace(**vars(compat) | {"take_along_axis": take_along_axis})


@contextlib.contextmanager
def _scope(torch: Any, kind: str, threads: int | None) -> Iterator[None]:
    """No gradients, `threads`, and float32 products in float32, even where the user allows TF32 or bfloat16."""
    matmul, n_threads = _matmul(torch, kind), torch.get_num_threads()
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.no_grad():
            yield
    finally:
        matmul.fp32_precision = precision
        if threads is not None:
            torch.set_num_threads(n_threads)


def _matmul(torch: Any, kind: str) -> Any:
    """Return the object whose `fp32_precision` says how float32 products are computed."""
    return torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn.matmul


def _compile(
    scope: Callable[[], contextlib.AbstractContextManager[None]],
    compiler: Callable[..., Any] | None,
    function: Callable[..., Any],
    static: tuple[str, ...] = (),
    donate: tuple[str, ...] = (),
) -> Callable[..., Any]:
    faster = function if compiler is None else compiler(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with scope():
            return faster(*args, **kwargs)

    return call


def _is_out_of_memory(torch: Any, error: BaseException) -> bool:
    messages = ("DefaultCPUAllocator:", "MPS backend out of memory")  # where there is no class of its own
    of_a_kind = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_a_kind or (isinstance(error, RuntimeError) and any(message in str(error) for message in messages))


def _peak_memory(torch: Any, device: str) -> int | None:
    if device == "mps":
        return None  # PyTorch does not count it
    return peak_process_memory() if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _settings(torch: Any, kind: str, scope: Callable[..., Any], compiled: bool) -> dict[str, str]:
    with scope():
        found = {
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "mkl": "yes" if torch.backends.mkl.is_available() else "no",
            "matmul_precision": _matmul(torch, kind).fp32_precision,
            "compiled": "yes" if compiled else "no",
        }
    if kind == "cuda":
        found |= {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}", "cudnn": torch.backends.cudnn.version()}
    return {key: str(value) for key, value in found.items()}
