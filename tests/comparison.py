"""How close is close enough: one table, and one helper that compares everything there is to compare."""

from typing import Any

import numpy as np
from array_api_compat import device as device_of

from gpt_xp import Backend

# The largest difference allowed, relative to the largest expected number. Each with its reason.
TOLERANCE = {
    # Logits against transformers in float64. float32 keeps 7 digits; sums over a few thousand products in another
    # order lose one of them. (The issue asks for 2e-5.)
    ("logits", "float32"): 2e-5,
    # The same in float64 keeps 16 digits and loses two.
    ("logits", "float64"): 1e-9,
    # Half precision keeps 3 digits (float16) or 2 (bfloat16), and every layer rounds the residual stream anew.
    ("logits", "float16"): 2e-2,
    ("logits", "bfloat16"): 1e-1,
    # The same formula twice, summed in another order: cached against full, batch against row, jitted against eager.
    ("same", "float32"): 5e-6,
    ("same", "float64"): 1e-13,
    # One elementary function, element by element.
    ("function", "float32"): 2e-6,
    ("function", "float64"): 1e-13,
    # A gradient is a sum over all tokens of products of such numbers.
    ("gradient", "float32"): 1e-4,
}


def assert_close(actual: Any, expected: Any, backend: Backend, kind: str, dtype: str | None = None) -> None:
    """Check that `actual`, an array of `backend`, has the right dtype, shape, device and values.

    `expected` is a NumPy array; `kind` is a row of `TOLERANCE`; `dtype` is the one expected (default: the backend's).
    """
    dtype = dtype or backend.dtype
    assert actual.dtype == getattr(backend.xp, dtype), f"dtype {actual.dtype}, expected {dtype}"
    assert device_of(actual) == device_of(backend.asarray(np.zeros(1, dtype=np.float32))), "another device"
    values = backend.to_numpy(backend.xp.astype(actual, getattr(backend.xp, widened(dtype))))
    assert_values(values, expected, TOLERANCE[kind, dtype])


def assert_values(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Check shape and values of NumPy arrays, relative to the largest expected number."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest number, allowed is {tolerance:.0e}"


def widened(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
