"""array-api-strict, for developers: NumPy that refuses everything outside the array API standard.

It refuses operations between its devices too, so "device1" finds the most common bug on GPUs without a GPU. "device2"
makes float32 arrays by default, as PyTorch does. "no_float64" of newer versions resembles Apple's GPUs.
"""

import os
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DeviceInfo, check_dtype, import_library
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.memory import physical_memory
from gpt_xp.types import Array

FIX = install_command("strict")


class StrictBackend(Backend):
    """array-api-strict on `device` (default: "CPU_DEVICE", also called "cpu")."""

    name = "array-api-strict"
    needs: ClassVar = {"array_api_strict": FIX}

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        xp = import_library("array_api_strict", FIX)
        self.device = "CPU_DEVICE" if device in (None, "cpu") else str(device)
        if self.device not in _devices(xp):
            raise BackendError(f"array-api-strict has no device {device!r}, only {', '.join(_devices(xp))}")
        if threads is not None:
            raise BackendError("array-api-strict has no threads to set: leave --threads out")
        self._device, self._host = _devices(xp)[self.device], _devices(xp)["CPU_DEVICE"]
        known = xp.__array_namespace_info__().dtypes(device=self._device, kind="real floating")
        check_dtype(self.name, self.device, dtype, known, why=" (the standard has no half precision)")
        self.version, self.dtype, self.xp, self.device_memory = xp.__version__, dtype, xp, physical_memory()

    @classmethod
    def info(cls) -> BackendInfo:
        """Return array-api-strict's version and devices."""
        xp = import_library("array_api_strict", FIX)
        kind, memory = f"{os.cpu_count()} cores", physical_memory()
        return BackendInfo(cls.name, xp.__version__, tuple(DeviceInfo(each, kind, memory) for each in _devices(xp)))

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return a NumPy array as one of array-api-strict on the device."""
        return self.xp.asarray(np.array(array, dtype=dtype), device=self._device)

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of array-api-strict as a NumPy array."""
        return np.from_dlpack(array.to_device(self._host))  # Only this way works in every version.

    def compile(self, function: Any, static: tuple[str, ...] = (), donate: tuple[str, ...] = ()) -> Any:
        """Return the function, which runs without NumPy's floating-point warnings; the logits are checked instead."""
        return np.errstate(all="ignore")(function)

    def settings(self) -> dict[str, str]:
        """Return the version of the standard."""
        return {"standard": self.xp.get_array_api_strict_flags()["api_version"]}


def _devices(xp: Any) -> dict[str, Any]:
    """Return the devices by name. Only their text shows the name; they have no attribute for it."""
    found = {str(device).split("'")[1]: device for device in xp.__array_namespace_info__().devices()}
    found.pop("no_x64", None)  # Its argmax fails (2.6.1), because NumPy returns int64, which that device refuses.
    return found
