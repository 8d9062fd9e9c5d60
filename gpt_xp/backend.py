"""The class that an array library is made a backend by, and its description.

A backend is one array library, on one device, in one dtype. It answers what the array API standard does not cover:
how arrays get to the device and back, how functions are compiled, how large a cache is made. All the mathematics stays
in `transformer.py`. `docs/adding-a-backend.md` shows one being written.
"""

import copy
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np

from gpt_xp import kv_cache
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError
from gpt_xp.kv_cache import KVCache
from gpt_xp.memory import peak_process_memory
from gpt_xp.types import Array, Namespace

if TYPE_CHECKING:
    from gpt_xp.generation.sampling import Choice

DecodeStep: TypeAlias = Callable[[Any], tuple[Any, Any]]  # state -> the next state, and what was computed on the way
SLOTS = 64  # a cache grows by so many slots at least, so that it seldom does


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


class Backend:
    """One array library, on one device, in one dtype.

    A subclass must set the attributes `name` to `xp`, and have the methods `__init__(device, dtype, threads)`, `info`,
    `asarray` and `to_numpy`. `device` None is the library's own choice, `threads` limits those of the CPU.
    `__init__` raises `BackendError` for a device or dtype that the library lacks. Everything else has a default, which
    suits a library that computes at once. Importing the subclass's module must not import its library.
    """

    name: str
    version: str
    device: str  # as the library names it: "cpu", "cuda:0"
    dtype: str  # of the params: "float32", "float64", "float16", "bfloat16"
    xp: Namespace

    # The modules without which the backend cannot work, and how to get them: {"torch": "pip install torch"}.
    needs: ClassVar[dict[str, str]] = {}
    needs_quantized: ClassVar[dict[str, str]] = {}  # what quantized weights need besides

    device_memory: int | None = None  # bytes in all
    # Whether logits are brought to the host and sampled by NumPy, where it is faster than the library.
    samples_on_host: bool = False
    # (step, state, k): run step(state) -> (state, output) k times as one program; return the last state and the
    # outputs, stacked. Called inside `compile`. None: each token is seen before the next one is computed.
    decode_block: "Callable[[DecodeStep, Any, int], tuple[Any, Any]] | None" = None
    # Choose the likeliest tokens from logits [batch, n_vocab] and the ids that are allowed [n_vocab] (None: all), where
    # the backend has something faster than `sampling.choose`. The `Choice` holds NumPy arrays.
    choose_likeliest: "Callable[[Array, Array | None], Choice] | None" = None

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        raise NotImplementedError

    @classmethod
    def info(cls) -> BackendInfo:
        """Return the library's version and devices. Raises `BackendError` where it is not installed."""
        raise NotImplementedError

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return a NumPy array, or one of the library's, on the device and in `dtype` (default: its own)."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of the library as one of NumPy."""
        raise NotImplementedError

    # --- computing ---

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return a function that computes the same, and runs on the device.

        The named arguments are static (hashable) or donated (consumed).
        """
        return function

    def compile_step(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Do the same for a step of the model: `function(params, tokens, cache, ..., xp=)` -> (output, cache)."""
        return self.compile(function, static, donate)

    def synchronize(self, array: Array) -> None:
        """Wait until the array is computed."""

    def quantized(self) -> "Backend":
        """Return the same backend with a namespace that takes quantized weights.

        Raises `BackendError` where it needs a library for them that is not installed.
        """
        from gpt_xp.quantization import QuantizedNamespace

        return self.replace(xp=QuantizedNamespace(self.xp, self.dtype))

    # --- the cache, and how prompts are cut ---

    def cache_slots(self, n_tokens: int, n_ctx: int) -> int:
        """Return how many slots a cache for `n_tokens` tokens has, in a model of context `n_ctx`.

        A library that compiles wants few different answers.
        """
        return min(-(-n_tokens // SLOTS) * SLOTS, n_ctx)

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache; the arguments are those of `gpt_xp.new_cache`."""
        return kv_cache.new_cache(config, like, n_slots, start, self.xp)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with more slots, by `kv_cache.grow_cache`."""
        return kv_cache.grow_cache(cache, n_slots, self.xp)

    def chunk_tokens(self, batch: int) -> int:
        """Return how many tokens of each of `batch` prompts are computed together in prefill."""
        return 128  # their activations stay in a CPU's cache

    def padded_length(self, n_tokens: int, n_prompt: int) -> int:
        """Return to how many tokens a chunk of `n_tokens`, of a prompt of `n_prompt`, is padded on the right."""
        return n_tokens

    # --- memory, time, settings ---

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether this error of the library says that memory was not enough."""
        return isinstance(error, MemoryError)

    def peak_memory(self) -> int | None:
        """Return the most memory, in bytes, that was in use so far; None where it is not known."""
        return peak_process_memory()

    def compile_seconds(self) -> float:
        """Return the seconds spent on compiling so far in this process."""
        return 0.0

    def keep_compiled(self) -> None:
        """Keep compiled programs on disk. It may change settings of the process, so only the command calls it."""

    def settings(self) -> dict[str, str]:
        """Return what else makes two runs differ, by name: libraries below, threads, precision."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other attributes or methods, for an experiment or a test."""
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed


def chunk_tokens_on_gpu(batch: int) -> int:
    """Return how many tokens of each prompt a library that launches kernels one by one computes together.

    Many, for the host takes as long to launch a kernel for few tokens. In all they are limited by what activations may
    take: with 1558M, 4096 tokens have 105 MB of them in float32 behind `c_fc`, and up to 0.4 GB of attention's scores.
    """
    return max(min(1024, 4096 // batch), 128)


def few_sizes(n_slots: int) -> int:
    """Round the slots of a cache up to 128, 256, 512, 768, 1024, ...: few sizes, and none is twice what it must be."""
    size = 128
    while size < n_slots:
        size *= 2
    return 768 if 512 < n_slots <= 768 else size


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
