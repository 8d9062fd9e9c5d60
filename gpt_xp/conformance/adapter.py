"""A backend of any namespace of the array API standard, for a library that has no adapter."""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from gpt_xp.backend import Backend
from gpt_xp.errors import BackendError
from gpt_xp.registry import backend_class, get_backend
from gpt_xp.types import Array, Namespace, NumpyArray

ADAPTER, WRAPPED, AS_IT_IS = "its adapter's namespace", "through array-api-compat", "as it is"

# These ways from an array to NumPy are tried in this order. The last ones are methods of arrays.
WAYS_BACK: dict[str, Callable[[Any], Any]] = {
    "__array__": np.asarray,
    "DLPack": np.from_dlpack,
    **{f"{name}()": methodcaller(name) for name in ("to_numpy", "unwrap_numpy", "numpy", "get")},
}


class NamespaceBackend(Backend):
    """A namespace as a backend, in float32: the library chooses the device, and nothing is compiled.

    The results of each step go to NumPy and back. Otherwise a lazy library, in which each step uses the cache of the
    step before, would have more and more left to compute. NumPy chooses the tokens.
    """

    samples_on_host = True

    def __init__(self, module: str) -> None:
        given = _import(module)
        probe = np.asarray([[0.5, -1.0, 3.0]], dtype=np.float32)
        try:
            array = given.asarray(probe)
        except AttributeError:
            raise BackendError(f"{module} has no asarray, and so it cannot take arrays from NumPy") from None
        self.name, self.version, self.device, self.dtype = module, _version(given), "default", "float32"
        self.xp, self.used = _namespace(given, array)
        # `xp` may be replaced by a namespace that calls this backend, which then needs the library's own namespace.
        self._own = self.xp
        self._array_type = type(array)
        self.way_back = _way_back(module, array, probe)
        self._to_numpy = WAYS_BACK[self.way_back]

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return an array of NumPy or of the library as one of the library."""
        if isinstance(array, self._array_type):
            return self._own.astype(array, getattr(self._own, dtype)) if dtype else array
        return self._own.asarray(np.array(array, dtype=dtype))

    def to_numpy(self, array: Array) -> NumpyArray:
        """Return an array of the library as a NumPy array."""
        return np.asarray(self._to_numpy(array))

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, whose results are computed when it returns."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.computed(function(*args, **kwargs))

        return call

    def computed(self, tree: Any) -> Any:
        """Return a tree of dicts, lists and tuples, in which each array has been to NumPy and back."""
        if isinstance(tree, self._array_type):
            return self.asarray(self.to_numpy(tree))
        if isinstance(tree, dict):
            return {key: self.computed(branch) for key, branch in tree.items()}
        if isinstance(tree, list | tuple):
            branches = map(self.computed, tree)
            return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
        return tree


def find_library(name: str) -> tuple[Backend, str]:
    """Return the backend for an adapter's name or a module's, and how it was found.

    Raises `BackendError` for a name that is neither, and for a library that is not installed or not usable.
    """
    if has_adapter(name):
        return get_backend(name), ADAPTER
    backend = NamespaceBackend(name)
    return backend, f"{backend.used}; to NumPy by {backend.way_back}"


def has_adapter(name: str) -> bool:
    """Return whether gpt-xp or another package has an adapter of this name."""
    try:
        backend_class(name)
    except BackendError:
        return False
    return True


def check_known(name: str) -> None:
    """Raise `BackendError` for a name that is neither an adapter's nor that of a module. Nothing is imported."""
    if has_adapter(name):
        return
    if not _can_be_found(name.partition(".")[0]):
        raise BackendError(
            f"there is no module {name!r} here, and no adapter of that name",
            "give a namespace that Python can import, such as numpy, dask.array or mlx.core, or a name that "
            "`gpt-xp backends` lists",
        )


def _can_be_found(package: str) -> bool:
    """Return whether Python finds a package or a module of one file."""
    if package in sys.builtin_module_names:  # None of them is an array library.
        return False
    try:
        # It asks the finders of editable installs too, and imports nothing for a name without a dot.
        if importlib.util.find_spec(package) is not None:
            return True
    except ValueError:  # The name is empty, or that of a module that was not found in a usual way.
        return False
    # The process that imports it finds the modules of the current directory too, after all others.
    return importlib.machinery.PathFinder.find_spec(package, [os.getcwd()]) is not None


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # A library may fail in any way when it is imported.
        raise BackendError(f"{module} cannot be imported: {type(error).__name__}: {error}") from None


def _namespace(given: Any, array: Array) -> tuple[Namespace, str]:
    """Return array-api-compat's namespace where it wraps this module, else the module itself.

    A module may have the arrays of another one, such as NumPy's, and functions that are its own.
    """
    try:
        found = array_namespace(array)
    except TypeError:
        return given, AS_IT_IS
    return (found, WRAPPED) if found.__name__ == f"array_api_compat.{given.__name__}" else (given, AS_IT_IS)


def _version(given: Any) -> str:
    package = given.__name__.partition(".")[0]
    for module in (given, sys.modules[package]):
        if isinstance(version := getattr(module, "__version__", None), str):
            return version
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _way_back(module: str, array: Array, expected: NumpyArray) -> str:
    """Return the first of `WAYS_BACK` that gives the same numbers."""
    for name, way in WAYS_BACK.items():
        try:
            found = np.asarray(way(array))
        except Exception:  # Each library refuses in its own way.
            continue
        if found.dtype == expected.dtype and np.array_equal(found, expected):
            return name
    raise BackendError(
        f"arrays of {module} cannot be read by NumPy", "give them __array__ or __dlpack__, as the standard has it"
    )
