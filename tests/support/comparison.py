"""Compares arrays of any backend with expected values, within gpt-xp's own tolerances."""

from typing import Any

import numpy as np

from gpt_xp import Backend
from gpt_xp.arrays import device_of
from gpt_xp.tolerances import TOLERANCE


def assert_close(actual: Any, expected: Any, backend: Backend, kind: str, dtype: str | None = None) -> None:
    """Check that `actual`, an array of `backend`, has the right dtype, shape, device and values.

    `expected` is a NumPy array, `kind` a row of `TOLERANCE`, and `dtype` the expected dtype (default: the backend's).
    """
    dtype = dtype or backend.dtype
    assert actual.dtype == getattr(backend.xp, dtype), f"dtype {actual.dtype}, expected {dtype}"
    assert device_of(actual) == device_of(backend.asarray(np.zeros(1, dtype=np.float32))), "another device"
    values = backend.to_numpy(backend.xp.astype(actual, getattr(backend.xp, widened(dtype))))
    assert_values(values, expected, TOLERANCE[kind, dtype])


def xp_of(backend: Backend) -> Any:
    """Return the `xp` to pass to a function of arrays: None if the function can infer it.

    The namespace that is inferred from MLX arrays lacks some of the standard's arguments.
    """
    return backend.xp if backend.name == "mlx" else None


def assert_values(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Check shape and values of NumPy arrays, relative to the largest expected number."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest number, allowed is {tolerance:.0e}"


def widened(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
