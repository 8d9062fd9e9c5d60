"""A package of someone else: backends for gpt-xp, each with one mistake, and one without.

It is laid out as pip installs it, so its folder on PYTHONPATH is all that it needs to be found.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpt_xp import Backend
from gpt_xp.backend import BackendInfo, DeviceInfo
from gpt_xp.registry import get_backend


def info(name: str) -> BackendInfo:
    """Describe one of them."""
    return BackendInfo(name, np.__version__, (DeviceInfo("cpu", "what NumPy computes on", None),))


def numpy_with(name: str, settings: dict[str, Any], **functions: Callable[..., Any]) -> Backend:
    """Return NumPy under another name, with these functions in place of its own."""
    numpy = get_backend("numpy", **settings)
    return replace(numpy, name=name, xp=SimpleNamespace(**vars(numpy.xp) | functions))
