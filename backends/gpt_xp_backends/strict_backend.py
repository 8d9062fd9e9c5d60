"""array-api-strict, for developers: NumPy that refuses whatever the array API standard does not promise.

It refuses operations between its devices too, so that "device1" finds the commonest bug on GPUs without one. "device2"
makes float32 where no dtype is given, as PyTorch does, and "no_float64" of newer versions is like a GPU of Apple.
"""

import os
from typing import Any

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, import_library, physical_memory
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.types import Array

FIX = install_command("strict")
NEEDS = {"array_api_strict": FIX}


def info() -> BackendInfo:
    """Return array-api-strict's version and devices; raises `BackendError` where it is not installed."""
    xp = import_library("array_api_strict", FIX)
    kind, memory = f"{os.cpu_count()} cores", physical_memory()
    return BackendInfo(
        "array-api-strict", xp.__version__, tuple(DeviceInfo(name, kind, memory) for name in _devices(xp))
    )


def create(device: str | None = None, dtype: str = "float32", threads: int | None = None) -> Backend:
    """Return the array-api-strict backend on `device` (default: "CPU_DEVICE", also called "cpu")."""
    xp = import_library("array_api_strict", FIX)
    name = "CPU_DEVICE" if device in (None, "cpu") else device
    if name not in _devices(xp):
        raise BackendError(f"array-api-strict has no device {name!r}, only {', '.join(_devices(xp))}")
    if threads is not None:
        raise BackendError("array-api-strict has no threads to set: leave --threads out")
    where, host = _devices(xp)[name], _devices(xp)["CPU_DEVICE"]
    known = xp.__array_namespace_info__().dtypes(device=where, kind="real floating")
    check_dtype("array-api-strict", name, dtype, known, why=" (the standard has no half precision)")

    def asarray(array: Any, dtype: str | None = None) -> Array:
        return xp.asarray(np.array(array, dtype=dtype), device=where)

    def compile(function: Any, static: tuple[str, ...] = (), donate: tuple[str, ...] = ()) -> Any:
        return np.errstate(all="ignore")(function)  # NumPy computes, and its flags say nothing: the logits are checked

    return Backend(
        name="array-api-strict",
        version=xp.__version__,
        device=name,
        dtype=dtype,
        xp=xp,
        asarray=asarray,
        to_numpy=lambda array: np.from_dlpack(array.to_device(host)),  # the one way that every version has
        compile=compile,
        device_memory=physical_memory(),
        settings=lambda: {"standard": xp.get_array_api_strict_flags()["api_version"]},
    )


def _devices(xp: Any) -> dict[str, Any]:
    """Return the devices under the names that `Device` takes, which they show and have no attribute for."""
    found = {str(device).split("'")[1]: device for device in xp.__array_namespace_info__().devices()}
    found.pop("no_x64", None)  # its argmax fails (2.6.1): NumPy gives int64, which that device refuses
    return found
