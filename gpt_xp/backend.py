"""Defines `Backend`, the class that makes an array library usable by gpt-xp.

A backend is one array library, on one device, in one dtype. It covers what the array API standard leaves open: moving
arrays to the device and back, compiling functions, the size of the cache. All the mathematics stays in
`transformer.py`. `docs/adding-a-backend.md` shows how to write one.
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
from gpt_xp.mesh import Hosts, MeshShape
from gpt_xp.quantization import Quantized, QuantizedNamespace
from gpt_xp.tree import tree_map
from gpt_xp.types import Array, Namespace, Params

if TYPE_CHECKING:
    from pathlib import Path

    from gpt_xp.generation.sampling import Choice

DecodeStep: TypeAlias = Callable[[Any], tuple[Any, Any]]  # state -> (next state, output of this step)


@dataclass(frozen=True)
class DeviceInfo:
    """A device that a backend can compute on: its name, its kind, and its memory in bytes (None: not known)."""

    name: str
    kind: str
    memory: int | None


@dataclass(frozen=True)
class BackendInfo:
    """The entry of one backend in `gpt_xp.backends()`. `problem` and `fix` are None if the backend can be used."""

    name: str
    version: str | None = None
    devices: tuple[DeviceInfo, ...] = ()
    problem: str | None = None
    fix: str | None = None


class Backend:
    """One array library, on one device, in one dtype.

    A subclass must set `name`, `version`, `device`, `dtype` and `xp`. It must define `info`, `asarray`, `to_numpy` and
    `__init__(device, dtype, threads)`. With `device` None the library chooses; `threads` limits the threads of the CPU.
    `__init__` raises `BackendError` for a device or dtype that the library lacks. Everything else has a default, which
    suits a library that computes at once. Importing the module of the subclass must not import its library.
    """

    name: str
    version: str
    device: str  # as the library names it: "cpu", "cuda:0"
    dtype: str  # of the params: "float32", "float64", "float16", "bfloat16"
    xp: Namespace

    # The modules that the backend needs, and how to install them: {"torch": "pip install torch"}.
    needs: ClassVar[dict[str, str]] = {}
    needs_quantized: ClassVar[dict[str, str]] = {}  # The modules that quantized weights need in addition.

    device_memory: int | None = None  # bytes in total
    cache_growth = 64  # slots; a cache has a multiple of this, so that it seldom grows
    takes_quantized = False  # `quantized` returns a backend where this is True.
    # True if a step waits until it is compiled, also where the backend could compute it in another way meanwhile.
    waits_for_compiling = False
    copies_params = False  # True if `place` copies all params, and takes misaligned arrays.
    # True if NumPy samples faster than the library: logits are then moved to the host.
    samples_on_host: bool = False
    # decode_block(step, state, k) runs step(state) -> (state, output) k times as one program. It returns the last state
    # and the stacked outputs. It is called inside `compile`. With None, the host sees each token before the next step.
    decode_block: "Callable[[DecodeStep, Any, int], tuple[Any, Any]] | None" = None
    # A faster way than `sampling.choose` to choose the likeliest tokens. It takes logits [batch, n_vocab] and which ids
    # are allowed [n_vocab] (None: all). The `Choice` that it returns holds NumPy arrays.
    choose_likeliest: "Callable[[Array, Array | None], Choice] | None" = None

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        raise NotImplementedError

    @classmethod
    def info(cls) -> BackendInfo:
        """Return the library's version and devices. Raises `BackendError` where it is not installed."""
        raise NotImplementedError

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return an array of NumPy or of the library, on the device and in `dtype` (default: unchanged)."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of the library as a NumPy array."""
        raise NotImplementedError

    def unplaced(self, params: Params, config: GPT2Config) -> Params:
        """Return params in the checkpoint's shapes, also those of `place`."""
        return params

    def place(self, params: Params, config: GPT2Config) -> Params:
        """Return params, quantized or not, on the device: arrays in the backend's dtype, and codes and scales as is."""

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Quantized):
                return type(leaf)(*map(self.asarray, leaf))
            return self.asarray(leaf, self.dtype)

        return tree_map(moved, params)  # type: ignore[no-any-return]

    def with_copies(self, params: Params, folder: "Path") -> "Backend":
        """Return the same backend, which may use copies of these params that it keeps in their folder."""
        return self

    def write_copy(self, folder: "Path") -> "Path":
        """Write a copy of a model's weights in the form that `place` gives them, for `with_copies`; return its path.

        Raises `BackendError` if the backend uses params as they are stored.
        """
        raise BackendError(f"{self.name} keeps no packed weights: `gpt-xp models pack` is for the backend native")

    def fetch(self, params: Params, config: GPT2Config) -> Params:
        """Return params of `place` as NumPy arrays. bfloat16, which NumPy lacks, becomes float32, which holds it."""

        def fetched(leaf: Any) -> Any:
            if isinstance(leaf, Quantized):
                return type(leaf)(*map(self.to_numpy, leaf))
            return self.to_numpy(self.xp.astype(leaf, self.xp.float32) if self.dtype == "bfloat16" else leaf)

        return tree_map(fetched, params)  # type: ignore[no-any-return]

    # --- computing ---

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return a function with the same results that runs on the device, compiled if the library compiles.

        The named arguments are static (hashable) or donated (consumed).
        """
        return function

    def compile_step(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Compile a step of the model, `function(params, tokens, cache, ..., xp=)` -> (output, cache).

        A backend that captures and replays steps overrides it. The other arguments are those of `compile`.
        """
        return self.compile(function, static, donate)

    def synchronize(self, array: Array) -> None:
        """Wait until the array is computed."""

    def quantized(self) -> "Backend":
        """Return the same backend with a namespace that takes quantized weights.

        Raises `BackendError` if it needs a library for them that is not installed.
        """
        return self.replace(xp=QuantizedNamespace(self.xp, self.dtype), takes_quantized=True)

    def rounding_activations(self) -> "Backend":
        """Return the same backend, whose products of quantized weights round the activations to int8.

        Raises `BackendError` if it has none.
        """
        raise BackendError(
            f"{self.name} does not round activations (w8a8, w4a8): take the backend native, or int8 or int4"
        )

    # --- the cache, and how prompts are cut ---

    def cache_slots(self, n_tokens: int, n_ctx: int) -> int:
        """Return the number of slots of a cache for `n_tokens` tokens, in a model of context `n_ctx`.

        Each number of slots is compiled anew, so a library that compiles should return few different ones.
        """
        return min(-(-n_tokens // self.cache_growth) * self.cache_growth, n_ctx)

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache; the arguments are those of `gpt_xp.new_cache`."""
        return kv_cache.new_cache(config, like, n_slots, start, self.xp)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with `n_slots` slots. The cache passed in is consumed."""
        return kv_cache.grow_cache(cache, n_slots, self.xp)

    def chunk_tokens(self, batch: int) -> int:
        """Return how many tokens of each of `batch` prompts are computed together in prefill."""
        return 128  # Their activations stay in a CPU's cache.

    def padded_length(self, n_tokens: int, n_prompt: int) -> int:
        """Return the length to which a chunk of `n_tokens` of a prompt of `n_prompt` is padded on the right."""
        return n_tokens

    # --- several devices, several processes: only JAX has them ---

    @classmethod
    def on_mesh(cls, shape: MeshShape, hosts: Hosts | None, **options: Any) -> "Backend":
        """Return the backend on a mesh of devices; the options are those of `__init__`. Raises `BackendError`."""
        raise BackendError(f"{cls.name} computes on one device; a mesh needs jax: take the backend jax")

    process_index = 0  # of the processes that share the mesh; process 0 prints and writes
    process_count = 1

    def full_batch(self, rows: int) -> int:
        """Return how many rows to compute for a batch of `rows`: more where several devices share them equally."""
        return rows

    @property
    def can_speculate(self) -> bool:
        """Speculation depends on time, so several processes would make different steps."""
        return self.process_count == 1

    def agreed(self, number: int) -> int:
        """Return the number (below 2^32) that process 0 has given."""
        return number

    def check_agreement(self, work: Any) -> None:
        """Raise `BackendError` where processes were given different work, of which `repr` tells everything."""

    def wait_for_others(self, place: str) -> None:
        """Wait until all processes have come to the `place` of the program that this names."""

    def shard(self, leaf: Any, dtype: str | None = None) -> Array:
        """Return an array of the state of training on the devices, each of which holds a part."""
        return self.asarray(leaf, dtype)

    def constrain(self, leaf: Array) -> Array:
        """Return an array inside a compiled program, placed as `shard` places it."""
        return leaf

    # --- memory, time, settings ---

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether this error of the library means that there was not enough memory."""
        return isinstance(error, MemoryError)

    def peak_memory(self) -> int | None:
        """Return the peak of memory use so far, in bytes; None if it is not known."""
        return peak_process_memory()

    def compile_seconds(self) -> float:
        """Return the seconds spent on compiling so far in this process."""
        return 0.0

    def keep_compiled(self) -> None:
        """Keep compiled programs on disk. This may change settings of the process, so only the command calls it."""

    def settings(self) -> dict[str, str]:
        """Return other settings that make two runs differ, by name: lower libraries, threads, precision."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some attributes or methods replaced, for an experiment or a test."""
        if unknown := [name for name in changes if not hasattr(self, name)]:
            raise TypeError(f"a backend has no attribute or method {unknown[0]!r}")
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed


def chunk_tokens_on_gpu(batch: int) -> int:
    """Return `chunk_tokens` for a GPU library that launches kernels one by one.

    The chunks are long, because launching a kernel takes the host as long for few tokens as for many. The memory of
    activations limits them: with 1558M in float32, 4096 tokens take 105 MB after `c_fc`, and up to 0.4 GB of scores.
    """
    return max(min(1024, 4096 // batch), 128)


def few_sizes(n_slots: int) -> int:
    """Round the slots of a cache up to 128, 256, 512, 768, 1024, 2048, ..., so that few sizes are compiled."""
    size = 128
    while size < n_slots:
        size *= 2
    return 768 if 512 < n_slots <= 768 else size


def import_library(module: str, fix: str) -> ModuleType:
    """Import an array library. Raises `BackendError` with `fix` if it is not installed; other errors pass through."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, package):  # The library is installed, but a module that it needs is not.
            raise
        raise BackendError(f"{package} is not installed", fix) from None


def check_dtype(backend: str, device: str, dtype: str, known: Iterable[str], why: str = "") -> None:
    """Raise `BackendError` unless the backend computes in `dtype` on that device. `why` is why 16 bits are missing."""
    names = list(known)
    if not isinstance(dtype, str):
        raise BackendError(f"dtype must be a name, one of {', '.join(names)}, not {dtype!r:.80}")
    if dtype not in names:
        why = why if "16" in dtype else ""
        raise BackendError(f"{backend} does not compute in {dtype} on {device}, only in {', '.join(names)}{why}")
