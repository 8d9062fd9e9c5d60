"""Finds the installed backends by their entry points: lists them, makes one, changes one for an experiment.

An entry point of the group `gpt_xp.backends` maps a name to a class, such as "numpy" to
`gpt_xp_backends.numpy_backend:NumPyBackend`.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from gpt_xp.backend import Backend, BackendInfo
from gpt_xp.errors import BackendError, SettingError
from gpt_xp.mesh import parse_hosts, parse_mesh
from gpt_xp.parts import ReplacedParts
from gpt_xp.reporting.text import closest_first


def backends() -> list[BackendInfo]:
    """Return a `BackendInfo` for each backend, and import the libraries of those that are installed."""
    return [_info(entry) for entry in _entries().values()]


def default_backend() -> str:
    """Return the name of the default backend: `GPT_XP_BACKEND`, else numpy."""
    return os.environ.get("GPT_XP_BACKEND") or "numpy"


def get_backend(
    name: str | Backend | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    mesh: str | None = None,
    hosts: str | None = None,
) -> Backend:
    """Return the backend called `name` (default: `GPT_XP_BACKEND`, else numpy). A `Backend` is returned unchanged.

    `mesh` and `hosts` are those of `load`. Raises `BackendError` if the name, device or dtype is unknown, the library
    is not installed, or there are too few devices. Raises `SettingError` for an invalid `mesh` or `hosts`.
    """
    if isinstance(name, Backend):
        if (device, threads, mesh, hosts) != (None,) * 4 or dtype not in ("float32", name.dtype):
            raise BackendError(
                "device, dtype, threads, mesh and hosts are settled when a Backend is made: give its name instead"
            )
        return name
    if hosts is not None and mesh is None:
        raise SettingError("hosts joins processes for a mesh: give mesh too, such as data=2")
    shape = None if mesh is None else parse_mesh(mesh)
    processes = None if hosts is None else parse_hosts(hosts)
    backend = backend_class(name or default_backend())
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise BackendError(f"threads must be a whole number of at least 1, not {threads!r:.80}")
    options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    return backend(**options) if shape is None else backend.on_mesh(shape, processes, **options)


def with_parts(backend: str | Backend | None = None, **parts: Callable[..., Any]) -> Backend:
    """Return a backend with parts of the model replaced by other functions: `with_parts("jax", gelu=mine)`.

    The parts are the functions marked `@part` in `transformer.py`. A replacement takes the arguments of the part. With
    the `xp` that it receives, it may call the original part. Pass the backend to `load` or `Model`, or its `xp` to
    `gpt2`. JAX compiles steps with replaced parts; NumPy and CuPy compute them one function at a time.

    Raises `SettingError` for a name that is not a part, and `BackendError` as `get_backend` does.
    """
    importlib.import_module("gpt_xp.transformer")  # It makes the list of parts.
    chosen = get_backend(backend)
    return chosen.replace(xp=ReplacedParts(chosen.xp, parts), quantized=lambda: with_parts(chosen.quantized(), **parts))


def backend_class(name: str) -> type[Backend]:
    """Return the class of a backend. Raises `BackendError` if there is no backend of that name."""
    entries = _entries()
    if name not in entries:
        known = closest_first(str(name), entries)
        raise BackendError(f"there is no backend {name!r}; there are: {', '.join(known)}")
    return cast(type[Backend], entries[name].load())


def check_installed(name: str, quantized: bool = False) -> None:
    """Raise `BackendError` if there is no backend of that name, or a library that it needs is not installed."""
    backend = backend_class(name)
    needs = backend.needs | (backend.needs_quantized if quantized else {})
    for module, fix in needs.items():
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"{module} is not installed", fix)


def _entries() -> dict[str, EntryPoint]:
    entries = {entry.name: entry for entry in entry_points(group="gpt_xp.backends")}
    if not entries:
        raise BackendError(
            "gpt-xp is not installed, and backends are found by what its installation records",
            "in its checkout, run: pip install -e .",
        )
    return entries


def _info(entry: EntryPoint) -> BackendInfo:
    try:
        return cast(type[Backend], entry.load()).info()
    except BackendError as error:  # The library is not installed.
        return BackendInfo(entry.name, problem=error.problem, fix=error.fix)
    except Exception as error:  # A library that fails to start must not hide the others.
        return BackendInfo(entry.name, problem=f"it fails to start: {type(error).__name__}: {error}")
