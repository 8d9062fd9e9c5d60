"""PyTorch on CPUs, and on GPUs of NVIDIA and AMD (cuda) and of Apple (mps). It was run on CPUs only so far.

On the CPU, params that are mapped from a file stay mapped. PyTorch has no read-only memory, and the process crashes if
such a tensor is written to in place: clone it first.

`GPT_XP_TORCH_COMPILE=1` compiles every step with `torch.compile`. That needs a C++ compiler (on CUDA, Triton) and half
a minute or more at the start of each process, which the statistics count as prefill and decode.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, chunk_tokens_on_gpu, import_library
from gpt_xp.environment import says_yes
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.memory import physical_memory
from gpt_xp.types import Array

FIX = install_command("torch")
GPU_FIX = "https://pytorch.org/get-started/locally says which build of PyTorch finds which GPU"
DTYPES = {
    "cpu": ("float32", "float64", "bfloat16", "float16"),
    "cuda": ("float32", "float64", "bfloat16", "float16"),
    "mps": ("float32", "bfloat16", "float16"),
}


class TorchBackend(Backend):
    """PyTorch on `device` ("cuda:1", "mps"; default: where PyTorch itself makes arrays, the CPU)."""

    name = "torch"
    needs: ClassVar = {"torch": FIX}

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        self._torch = torch = import_library("torch", FIX)
        where = _find_device(torch, device)
        self._kind = kind = where.name.partition(":")[0]
        check_dtype("torch", where.name, dtype, DTYPES[kind])
        if threads is not None and kind != "cpu":
            raise BackendError(f"torch computes on {where.name} and has no threads to set there: leave --threads out")
        self._is_compiled = says_yes("GPT_XP_TORCH_COMPILE")
        self._scope = functools.partial(_scope, torch, kind, threads)
        self.version, self.device, self.dtype, self.xp = torch.__version__, where.name, dtype, _namespace(torch)
        self.device_memory = where.memory
        self.samples_on_host = kind == "cpu"  # There, PyTorch sorts a vocabulary in 4 to 8 ms, and NumPy in 0.3 ms.

    @classmethod
    def info(cls) -> BackendInfo:
        """Return PyTorch's version and devices."""
        torch = import_library("torch", FIX)
        return BackendInfo("torch", torch.__version__, _devices(torch))

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return a NumPy array, or a tensor, as a tensor on the device."""
        tensor = array if isinstance(array, self._torch.Tensor) else self._torch.from_numpy(_unmarked(array))
        return tensor.to(device=self.device, dtype=getattr(self._torch, dtype) if dtype else None)

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return a tensor as a NumPy array."""
        found: np.ndarray[Any, Any] = array.numpy(force=True)
        return found

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, which runs under the backend's settings, compiled by PyTorch if the user wants it."""
        faster = self._torch.compile(function) if self._is_compiled else function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._scope():
                return faster(*args, **kwargs)

        return call

    def synchronize(self, array: Array) -> None:
        """Wait until the GPU has finished."""
        if self._kind != "cpu":
            getattr(self._torch, self._kind).synchronize()

    def chunk_tokens(self, batch: int) -> int:
        """Return the default on a CPU, and more tokens on a GPU."""
        return super().chunk_tokens(batch) if self._kind == "cpu" else chunk_tokens_on_gpu(batch)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether PyTorch reports a lack of memory, by the error's class or message."""
        messages = ("DefaultCPUAllocator:", "MPS backend out of memory")  # These errors have no special class.
        of_a_kind = isinstance(error, self._torch.OutOfMemoryError | MemoryError)
        return of_a_kind or (isinstance(error, RuntimeError) and any(message in str(error) for message in messages))

    def peak_memory(self) -> int | None:
        """Return the peak memory of the process or the GPU. PyTorch does not count it on mps."""
        if self._kind == "mps":
            return None
        return super().peak_memory() if self._kind == "cpu" else self._torch.cuda.max_memory_allocated(self.device)

    def settings(self) -> dict[str, str]:
        """Return PyTorch's threads, libraries and precision."""
        torch = self._torch
        with self._scope():
            found = {
                "threads": torch.get_num_threads(),
                "interop_threads": torch.get_num_interop_threads(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "mkl": "yes" if torch.backends.mkl.is_available() else "no",
                "matmul_precision": _matmul(torch, self._kind).fp32_precision,
                "compiled": "yes" if self._is_compiled else "no",
            }
        if self._kind == "cuda":
            cuda = torch.version.cuda or f"ROCm {torch.version.hip}"
            found |= {"cuda": cuda, "cudnn": torch.backends.cudnn.version()}
        return {key: str(value) for key, value in found.items()}


def _devices(torch: Any) -> tuple[DeviceInfo, ...]:
    found = [DeviceInfo("cpu", f"{os.cpu_count()} cores", physical_memory())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(DeviceInfo(f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(DeviceInfo("mps", "Apple GPU", torch.mps.recommended_max_memory()))
    return tuple(found)


def _find_device(torch: Any, name: str | None) -> DeviceInfo:
    """Return the device called `name`; "cuda" is the first CUDA device, and "gpu" the first GPU of any kind."""
    devices = {device.name: device for device in _devices(torch)}
    gpus = [each for each in devices if each != "cpu"]
    aliases = {"cuda": "cuda:0", "mps:0": "mps", "gpu": gpus[0] if gpus else "gpu"}
    name = name or str(torch.get_default_device())
    try:
        return devices[aliases.get(name, name)]
    except KeyError:
        raise BackendError(f"torch has no device {name!r} here, only {', '.join(devices)}", GPU_FIX) from None


def _unmarked(array: Any) -> "np.ndarray[Any, Any]":
    """Return the same memory as a writable array, because PyTorch warns about read-only ones."""
    array = np.asarray(array, order="C")
    interface = array.__array_interface__
    unmarked = SimpleNamespace(__array_interface__=interface | {"data": (interface["data"][0], False)}, owner=array)
    return array if array.flags.writeable else np.asarray(unmarked)


def _namespace(torch: Any) -> SimpleNamespace:
    """Return array-api-compat's PyTorch with a `take_along_axis` that takes any integers; PyTorch needs int64."""
    import array_api_compat.torch as compat

    def take_along_axis(x: Array, indices: Array, /, *, axis: int = -1) -> Array:
        return compat.take_along_axis(x, indices.to(torch.int64), axis=axis)

    return SimpleNamespace(**vars(compat) | {"take_along_axis": take_along_axis})


@contextlib.contextmanager
def _scope(torch: Any, kind: str, threads: int | None) -> Iterator[None]:
    """Set the number of threads, turn off gradients, and compute float32 products in float32.

    The user's settings, which may allow TF32 or bfloat16, are restored at the end.
    """
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
    """Return the object whose `fp32_precision` sets how float32 products are computed."""
    return torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn.matmul
