"""Products whose factors are rounded to float16, whatever dtype was asked for."""

from typing import Any

import numpy as np

import wrong_backends
from gpt_xp import Backend
from gpt_xp.backend import BackendInfo

NAME = "wrong-float16"


def info() -> BackendInfo:
    """Return what it is."""
    return wrong_backends.info(NAME)


def create(**settings: Any) -> Backend:
    """Return the backend; the settings are NumPy's."""
    return wrong_backends.numpy_with(NAME, settings, matmul=lambda a, b: np.matmul(rounded(a), rounded(b)))


def rounded(x: Any) -> Any:
    """Keep 11 bits of each number."""
    return x.astype(np.float16).astype(x.dtype)
