"""NumPy as it is."""

from typing import Any

import wrong_backends
from gpt_xp import Backend
from gpt_xp.backend import BackendInfo

NAME = "right-numpy"


def info() -> BackendInfo:
    """Return what it is."""
    return wrong_backends.info(NAME)


def create(**settings: Any) -> Backend:
    """Return the backend; the settings are NumPy's."""
    return wrong_backends.numpy_with(NAME, settings)
