"""array-api-strict as a backend: it refuses whatever the array API standard does not promise.

Its second device, "device1", refuses any operation that mixes devices: the commonest bug on GPUs, found without one.
"""

from typing import Any

import numpy as np

from gpt_xp import Backend


def strict_backend(device: str, dtype: str = "float32", **changes: Any) -> Backend:
    import array_api_strict as xp

    where, host = xp.Device(device), xp.Device("CPU_DEVICE")

    def asarray(array: np.ndarray, dtype: str | None = None) -> Any:
        return xp.asarray(np.array(array, dtype=dtype), device=where)

    def to_numpy(array: Any) -> np.ndarray:
        return np.from_dlpack(array.to_device(host))  # array-api-strict 2.4 converts to NumPy in no other way

    return Backend(
        name="array-api-strict", version=xp.__version__, device=device, dtype=dtype, xp=xp,
        asarray=asarray, to_numpy=to_numpy, **changes,
    )  # fmt: skip
