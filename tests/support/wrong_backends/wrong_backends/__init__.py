"""A package of someone else: backends for gpt-xp, each with one mistake, and one without.

It is laid out as pip installs it, so its folder on PYTHONPATH is all that it needs to be found.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from gpt_xp_backends.numpy_backend import NumPyBackend, namespace


class NumPyWith(NumPyBackend):
    """NumPy with other functions in place of some of its own."""

    def __init__(self, functions: dict[str, Callable[..., Any]], **settings: Any) -> None:
        super().__init__(**settings)
        self.xp = SimpleNamespace(**vars(namespace()) | functions)
