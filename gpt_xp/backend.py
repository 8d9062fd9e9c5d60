"""What a backend is, how one is found, and how one is chosen.

A backend is one array library on one device in one dtype, as a small record of what the standard does not cover:
moving arrays between host and device, compiling, synchronizing. All the mathematics stays in `model.py`.

An adapter is a module with two functions, named by an entry point of the group `gpt_xp.backends`:

    create(device: str | None, dtype: str, threads: int | None) -> Backend
    info() -> BackendInfo

It may have a `NEEDS`, such as {"torch": "pip install torch"}: the modules without which it cannot work, and how to get
them. Importing an adapter must not import its library. CONTRIBUTING shows one being written.
"""

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from gpt_xp.errors import BackendError
from gpt_xp.generation.sampling import Choice
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.parts import ReplacedParts
from gpt_xp.reporting.text import closest_first
from gpt_xp.types import Array, Namespace

Step: TypeAlias = Callable[[Any], tuple[Any, Any]]  # state -> the next state, and what was computed on the way
DecodeBlock: TypeAlias = Callable[[Step, Any, int], tuple[Any, Any]]


class Compile(Protocol):
    """Make a function faster, with the named arguments static (hashable) or donated (consumed)."""

    def __call__(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return a function that computes the same."""


def _as_it_is(
    function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
) -> Callable[..., Any]:
    return function


def is_step(function: Callable[..., Any]) -> bool:
    """Whether a function that `compile` is given is a step of the model, by its first arguments (see `steps`)."""
    return [*inspect.signature(function).parameters][:3] == ["params", "tokens", "cache"]


def _no_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def peak_process_memory() -> int | None:
    """The most memory, in bytes, that this process has held so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # getrusage there begins with the peak of the process that started this one
        with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
            if found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read(), re.MULTILINE):
                return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


def physical_memory() -> int | None:
    """The memory of this machine in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def piece_on_gpu(batch: int) -> int:
    """Return how many tokens of each of so many prompts a library that launches kernels one by one computes together.

    Many, for the host takes as long to launch a kernel for few tokens. In all they are limited by what activations may
    take: with 1558M, 4096 tokens have 105 MB of them in float32 behind `c_fc`, and up to 0.4 GB of scores of attention.
    """
    return max(min(1024, 4096 // batch), 128)


ITEM_SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # bytes of a number, by dtype


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One array library, on one device, in one dtype. The defaults suit a library that computes at once."""

    name: str
    version: str
    device: str  # as the library names it: "cpu", "cuda:0"
    dtype: str  # of the params: "float32", "float64", "float16", "bfloat16"
    xp: Namespace
    asarray: Callable[..., Array]  # (numpy array, dtype: str | None = None) -> array on the device
    to_numpy: Callable[[Array], "np.ndarray[Any, Any]"]

    compile: Compile = _as_it_is
    synchronize: Callable[[Array], None] = lambda array: None
    # How many slots of the cache to look at when n are in use; a compiler wants few different answers.
    window: Callable[[int], int] = lambda n: n
    # How many slots to make for n tokens in a model of context n_ctx.
    slots: Callable[[int, int], int] = lambda n, n_ctx: n
    new_cache: Callable[..., KVCache] = new_cache
    # (cache, n_slots) -> the same cache with so many slots. With it a cache begins with the slots that the first step
    # looks at, and grows; without, it has all that it may need.
    grown: Callable[..., KVCache] | None = None
    # How many tokens of each of so many prompts are computed together: few stay in the processor's cache.
    piece: Callable[[int], int] = lambda batch: 128
    # To how many tokens a piece of n, out of a prompt of `total`, is padded on the right.
    pad: Callable[[int, int], int] = lambda n, total: n
    # Run step(state) -> (state, output) k times as one program; return the last state and the outputs, stacked. Called
    # inside `compile`. None: steps are run one by one, and each token is seen before the next is computed.
    decode_block: DecodeBlock | None = None
    # XLA takes 10 ms to sort a vocabulary on a CPU and NumPy 0.3: there, logits are sampled by NumPy.
    samples_on_host: bool = False
    # Choose the likeliest tokens from logits [batch, n_vocab] and the ids that are allowed [n_vocab] (None: all), where
    # the backend has something faster than `choose`. The `Choice` holds NumPy arrays.
    choose_likeliest: "Callable[[Array, Array | None], Choice] | None" = None

    is_out_of_memory: Callable[[BaseException], bool] = _no_memory_error
    device_memory: int | None = None  # bytes in all
    peak_memory: Callable[[], int | None] = peak_process_memory
    compile_seconds: Callable[[], float] = lambda: 0.0  # spent so far in this process
    # Keep compiled programs on disk. It may change settings of the process, so only the command calls it.
    keep_compiled: Callable[[], None] = lambda: None
    # What else makes two runs differ, name by name: libraries below, threads, precision; for `compare` and the doctor.
    settings: Callable[[], dict[str, str]] = dict
    # The same backend with a namespace that takes quantized weights, where it has a better product with them than by
    # dequantizing; see `quantization.quantized_backend`.
    quantized: "Callable[[Backend], Backend] | None" = None


@dataclass(frozen=True)
class DeviceInfo:
    """A device that a backend can compute on: its name, what it is, and its memory in bytes (None: not known)."""

    name: str
    kind: str
    memory: int | None


@dataclass(frozen=True)
class BackendInfo:
    """One line of `gpt_xp.backends()`: `problem` and `fix` are None where the backend can be used."""

    name: str
    version: str | None = None
    devices: tuple[DeviceInfo, ...] = ()
    problem: str | None = None
    fix: str | None = None


def backends() -> list[BackendInfo]:
    """What backends there are, installed or not; this imports the libraries of those that are."""
    return [_info(entry) for entry in _entries().values()]


def default_backend() -> str:
    """The name of the backend that is taken where none is given: `GPT_XP_BACKEND`, else numpy."""
    return os.environ.get("GPT_XP_BACKEND") or "numpy"


def get_backend(
    name: str | Backend | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
) -> Backend:
    """Return the backend called `name` (default: `GPT_XP_BACKEND`, else numpy); a `Backend` is returned as it is.

    Raises `BackendError` when the name, device or dtype is unknown, or the library is not installed.
    """
    if isinstance(name, Backend):
        if (device, threads) != (None, None) or dtype not in ("float32", name.dtype):
            raise BackendError("device, dtype and threads are settled when a Backend is made: give its name instead")
        return name
    entry = check_name(name or default_backend())
    if threads is not None and threads < 1:
        raise BackendError(f"threads must be at least 1, not {threads}")
    return cast(Backend, entry.load().create(device=device, dtype=dtype, threads=threads))


def with_parts(backend: str | Backend | None = None, **parts: Callable[..., Any]) -> Backend:
    """Return a backend on which parts of the model are other functions: `with_parts("jax", gelu=mine)`.

    The parts are the functions marked `@part` in `model.py`. A replacement is called with the arguments of the part.
    With the `xp` that it is given, it may call the part itself. Give the backend to `load` or `Model`, or its `xp` to
    `gpt2`. JAX compiles steps with replaced parts; NumPy and CuPy compute them one function at a time.

    Raises `SettingError` for a name that is no part, and `BackendError` as `get_backend` does.
    """
    chosen = get_backend(backend)
    xp = ReplacedParts(chosen.xp, parts)

    def quantized(_: Backend) -> Backend:
        from gpt_xp.quantization import quantized_backend

        return with_parts(quantized_backend(chosen), **parts)

    return replace(chosen, xp=xp, quantized=quantized)


def check_name(name: str) -> EntryPoint:
    """Return where the backend of that name is, installed or not; `BackendError` if there is none of that name."""
    entries = _entries()
    if name not in entries:
        known = closest_first(str(name), entries)
        raise BackendError(f"there is no backend {name!r}; there are: {', '.join(known)}")
    return entries[name]


def check_installed(name: str, quantized: bool = False) -> None:
    """Raise `BackendError` where there is no backend of that name, or a library that it needs is not installed.

    Nothing is imported but the adapter, which names these libraries in `NEEDS` and `NEEDS_QUANTIZED`, if at all.
    """
    adapter = check_name(name).load()
    needs = getattr(adapter, "NEEDS", {}) | (getattr(adapter, "NEEDS_QUANTIZED", {}) if quantized else {})
    for module, fix in needs.items():
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"{module} is not installed", fix)


def import_library(module: str, fix: str) -> ModuleType:
    """Import an array library; `BackendError` with `fix` where it is missing. Other errors are let through."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, package):  # the library is there, and something that it needs is not
            raise
        raise BackendError(f"{package} is not installed", fix) from None


def check_dtype(backend: str, device: str, dtype: str, known: Iterable[str], why: str = "") -> None:
    """Raise `BackendError` unless `dtype` is one that the backend really computes in on that device."""
    names = list(known)
    if dtype not in names:
        raise BackendError(f"{backend} does not compute in {dtype} on {device}, only in {', '.join(names)}{why}")


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
        return cast(BackendInfo, entry.load().info())
    except BackendError as error:  # the library is missing
        return BackendInfo(entry.name, problem=error.problem, fix=error.fix)
    except Exception as error:  # one library that cannot even start must not hide the others
        return BackendInfo(entry.name, problem=f"it fails to start: {type(error).__name__}: {error}")
