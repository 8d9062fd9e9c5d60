"""Namespaces made from that of a library: one that computes at once, and one with NumPy in place of some functions."""

from collections.abc import Callable, Collection
from typing import Any

import array_api_compat.numpy as np

from gpt_xp.backend import Backend
from gpt_xp.conformance.functions import NAMES
from gpt_xp.types import Namespace

DTYPES = ("float32", "float64", "int32")
# Only these names are functions that return arrays.
COMPUTING = frozenset(NAMES) - {"finfo", *DTYPES}


class EagerNamespace:
    """A namespace whose functions compute their results at once, so that an error arises in the line of its cause.

    Operators and indexing belong to the arrays, and stay lazy. Their errors arise in the line of the next function.
    """

    def __init__(self, xp: Namespace, computed: Callable[[Any], Any]) -> None:
        self._xp, self._computed = xp, computed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        if name not in COMPUTING:
            return value
        return lambda *args, **kwargs: self._computed(value(*args, **kwargs))


class NumPyInPlace:
    """A namespace in which NumPy computes some functions, so that those after a failing one can be checked too."""

    def __init__(self, backend: Backend, names: Collection[str]) -> None:
        self._xp, self._backend, self._names = backend.xp, backend, frozenset(names) & COMPUTING
        self._array_type = type(backend.asarray(np.zeros(1, dtype=np.float32)))

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            return getattr(self._xp, name)

        def call(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            values = {key: self._numpy(value) for key, value in kwargs.items()}
            return self._backend.asarray(np.asarray(getattr(np, name)(*map(self._numpy, args), **values)))

        return call

    def _numpy(self, value: Any) -> Any:
        """Return NumPy's array or dtype in place of the library's, and any other argument as it is."""
        if isinstance(value, self._array_type):
            return self._backend.to_numpy(value)
        if isinstance(value, list):
            return [self._numpy(each) for each in value]
        for name in DTYPES:
            dtype = getattr(self._xp, name, None)
            if type(value) is type(dtype) and value == dtype:
                return getattr(np, name)
        return value
