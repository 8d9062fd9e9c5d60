"""JAX, on CPUs, GPUs and TPUs, with every step compiled by XLA."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DecodeStep, DeviceInfo, check_dtype, few_sizes, import_library
from gpt_xp.config import GPT2Config
from gpt_xp.environment import gpt_xp_home
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache
from gpt_xp.memory import physical_memory
from gpt_xp.types import Array, Namespace

GPU_FIX = f"for an NVIDIA GPU, {install_command('jax-cuda13')} (for CUDA 12: jax-cuda12)"
FIX = f"{install_command('jax')}; for an NVIDIA GPU, jax-cuda13 or jax-cuda12 in place of jax"
BLOCK = 128  # the shortest cache; chunks of a prompt are padded to multiples of it
SHORT = 16  # the length of a chunk for short prompts
LONG = 512  # tokens of a chunk, over all rows: 512 at once take 0.83 of the time of four times 128


class JaxBackend(Backend):
    """JAX on `device` ("cpu", "gpu", "cuda:1"; default: JAX's first)."""

    name = "jax"
    needs: ClassVar = {"jax": FIX}

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        with contextlib.nullcontext() if threads is None else _starting_with(threads):
            self._jax = jax = import_library("jax", FIX)
            self._device = where = _find_device(jax, device)
        # XLA's CPU compiler widens 16-bit products to float32: slower than float32, and not what was asked for.
        half = () if where.platform == "cpu" else ("bfloat16", "float16")
        check_dtype("jax", _name(where), dtype, ("float32", "float64", *half))
        self._scope = functools.partial(_scope, jax, dtype)
        self._compile_seconds = _stopwatch(jax)
        self.version, self.device, self.dtype = jax.__version__, _name(where), dtype
        self.device_memory = _device_info(where).memory
        vars(self).update(on_cpus() if where.platform == "cpu" else on_accelerators())

    @classmethod
    def info(cls) -> BackendInfo:
        """Return JAX's version and devices."""
        jax = import_library("jax", FIX)
        try:
            return BackendInfo("jax", jax.__version__, tuple(_device_info(device) for device in _all_devices(jax)))
        except BackendError as error:
            return BackendInfo("jax", jax.__version__, problem=error.problem, fix=error.fix)

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return a NumPy array, or one of JAX, on the device. It is cast there: NumPy alone knows no bfloat16."""
        with self._scope():
            moved = self._jax.device_put(array, self._device)
            return moved if dtype is None else moved.astype(dtype)

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of JAX as one of NumPy."""
        return np.asarray(array)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function, jitted, inside the backend's settings."""
        jitted = self._jax.jit(function, static_argnames=static, donate_argnames=donate)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._scope():
                return jitted(*args, **kwargs)

        return call

    def synchronize(self, array: Array) -> None:
        """Wait until the array is computed."""
        array.block_until_ready()

    def cache_slots(self, n_tokens: int, n_ctx: int) -> int:
        """Return one of few sizes: each has a compiled program of its own."""
        return min(few_sizes(n_tokens), -(-n_ctx // BLOCK) * BLOCK)

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache, also in float64."""
        with self._scope():
            return super().new_cache(config, like, n_slots, start)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with more slots, also in float64."""
        with self._scope():
            return super().grow_cache(cache, n_slots)

    def chunk_tokens(self, batch: int) -> int:
        """Return a multiple of `BLOCK`."""
        return max(LONG // batch // BLOCK, 1) * BLOCK

    def padded_length(self, n_tokens: int, n_prompt: int) -> int:
        """Return one of few lengths."""
        return SHORT if n_prompt <= SHORT else -(-n_tokens // BLOCK) * BLOCK

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether XLA says so."""
        return "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)

    def peak_memory(self) -> int | None:
        """Return the peak of the device, where it counts it, or of the process."""
        stats = self._device.memory_stats()
        return stats.get("peak_bytes_in_use") if stats else super().peak_memory()

    def compile_seconds(self) -> float:
        """Return the seconds of tracing and compiling."""
        return self._compile_seconds()

    def keep_compiled(self) -> None:
        """Keep compiled programs in the user's cache folder."""
        _keep_compiled(self._jax)

    def settings(self) -> dict[str, str]:
        """Return XLA's version, and the variables that it reads."""
        return _settings(self._jax, self._device, self._scope)


def on_cpus() -> dict[str, Any]:
    """Return what the backend has of its own on a CPU, where a step takes longer than its dispatch."""
    return {"xp": _namespace_for_cpus(), "decode_block": None, "samples_on_host": True}


def on_accelerators() -> dict[str, Any]:
    """Return what it has on a GPU or TPU instead."""
    import jax.numpy

    return {"xp": jax.numpy, "decode_block": decode_block, "samples_on_host": False}


def decode_block(step: DecodeStep, state: Any, k: int) -> tuple[Any, Any]:
    """Run `step` k times without the host; see `Backend.decode_block`."""
    import jax

    final, outputs = jax.lax.scan(lambda state, _: step(state), state, length=k)
    return final, outputs


@functools.cache  # one object: JAX compiles anew for another
def _namespace_for_cpus() -> Namespace:
    """Return jax.numpy with a `matmul` that reads the cache where it is, for the one query of a decode step.

    XLA's CPU compiler takes long for such products of more than three axes, and copies transposed keys into that order
    first. Written the other way round, keys times query, the same product needs no such copy.
    """
    import jax.numpy as jnp

    def matmul(a: Array, b: Array) -> Array:
        if a.ndim < 3 or a.shape[-2] != 1 or a.shape[:-2] != b.shape[:-2]:
            return jnp.matmul(a, b)
        a3, b3 = (x.reshape((-1, *x.shape[-2:])) for x in (a, b))  # [batch, n_head, ...] -> [batch * n_head, ...]
        if b.shape[-1] > b.shape[-2]:
            product = jnp.matrix_transpose(jnp.matmul(jnp.matrix_transpose(b3), jnp.matrix_transpose(a3)))
        else:
            product = jnp.matmul(a3, b3)
        return product.reshape((*a.shape[:-1], b.shape[-1]))

    namespace = ModuleType("jax.numpy for CPUs")
    vars(namespace).update(vars(jnp) | {"matmul": matmul})
    return namespace


@contextlib.contextmanager
def _scope(jax: Any, dtype: str) -> Iterator[None]:
    """float32 means float32 (the default on GPUs is TF32), and float64 is allowed where it was asked for.

    So is rank promotion, by which a bias [n] is added to rows [rows, n], whatever the program has set.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if dtype == "float64":
            stack.enter_context(jax.enable_x64(True))
        yield


def _all_devices(jax: Any) -> list[Any]:
    """Return JAX's devices, its default first. Raises `BackendError` where its settings leave it none."""
    try:
        found = list(jax.devices())
    except (RuntimeError, AssertionError) as error:  # it has no error of its own for this
        setting = os.environ.get("JAX_PLATFORMS", "")
        raise BackendError(
            f"jax cannot start on JAX_PLATFORMS={setting!r}{f' ({error})' if str(error) else ''}",
            f"unset that variable; {GPU_FIX}",
        ) from None
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
        found += [device for device in jax.devices("cpu") if device not in found]
    return found


def _find_device(jax: Any, name: str | None) -> Any:
    """Return the device called "cuda:1", or the first of a platform called "cuda", "gpu", "tpu" or "cpu"."""
    devices = _all_devices(jax)
    if name is None:
        return devices[0]
    platform, _, index = name.partition(":")
    try:
        return dict(enumerate(jax.devices(platform)))[int(index or 0)]
    except (RuntimeError, KeyError, ValueError):  # no such platform, no device of that number, no number
        names = ", ".join(map(_name, devices))
        cause = f"; {GPU_FIX}" if platform in ("gpu", "cuda") else ""
        raise BackendError(f"jax has no device {name!r} here, only {names}{cause}") from None


def _name(device: Any) -> str:
    if device.platform == "cpu" and device.id == 0:
        return "cpu"
    return f"{'cuda' if device.platform == 'gpu' else device.platform}:{device.id}"


def _device_info(device: Any) -> DeviceInfo:
    if device.platform == "cpu":
        return DeviceInfo(_name(device), f"{os.cpu_count()} cores", physical_memory())
    stats = device.memory_stats() or {}
    return DeviceInfo(_name(device), device.device_kind, stats.get("bytes_limit"))


_threads_at_start: list[int] = []  # the number of threads, if gpt-xp has started XLA with one


@contextlib.contextmanager
def _starting_with(threads: int) -> Iterator[None]:
    """Let JAX start in the body with so many threads. XLA reads the variable NPROC once, when it makes its pool."""
    before = os.environ.get("NPROC")
    if "jax" in sys.modules:
        if before != str(threads) and threads not in _threads_at_start:
            raise BackendError(
                f"jax cannot change its number of threads once it is loaded: set NPROC={threads} before Python starts"
            )
        yield
        return
    os.environ["NPROC"] = str(threads)
    try:
        yield
        _threads_at_start.append(threads)
    finally:  # other libraries read it too, and so does every process that is started from this one
        os.environ.pop("NPROC")
        if before is not None:
            os.environ["NPROC"] = before


@functools.cache
def _stopwatch(jax: Any) -> Callable[[], float]:
    """Count the seconds that JAX reports as spent on tracing and compiling."""
    spent = [0.0]

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def _keep_compiled(jax: Any) -> None:
    """Keep compiled programs in the user's cache folder, unless the user has chosen a place, or there is none.

    JAX takes the folder for the whole process, from its first program on: so the command calls this, and never the
    library.
    """
    kept = gpt_xp_home()
    if jax.config.jax_compilation_cache_dir is not None or kept is None:
        return
    folder = kept / "jax" / _shareable(jax)
    if not _can_be_written(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # A disk that is full, or a program that cannot be read, costs the time to compile, and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _shareable(jax: Any) -> str:
    """Return the name of a folder for programs that may be shared: of these versions, on this kind of CPU.

    JAX's own keys leave the CPU out, so that a home folder on several machines gives one the instructions of another.
    """
    cpu = hashlib.sha256("\n".join(_cpu()).encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-jaxlib-{importlib.metadata.version('jaxlib')}-{platform.machine()}-{cpu}"


def _cpu() -> list[str]:
    """Return what tells one kind of CPU from another: what Linux says of the first, or its name."""
    kinds = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features", "isa")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        return [line for line in info.read().partition("\n\n")[0].splitlines() if line.startswith(kinds)]
    return [platform.processor()]


def _settings(jax: Any, device: Any, scope: Callable[..., Any]) -> dict[str, str]:
    names = ["XLA_FLAGS", "JAX_PLATFORMS"]
    if device.platform == "cpu":
        names += ["NPROC"]
    else:  # how much of its memory is taken at once
        names += [f"XLA_PYTHON_CLIENT_{name}" for name in ("PREALLOCATE", "MEM_FRACTION", "ALLOCATOR")]
    with scope():
        found = {
            "platform": " ".join(device.client.platform_version.split()),  # on a GPU with CUDA's version
            "jaxlib": importlib.metadata.version("jaxlib"),
            "matmul_precision": str(jax.config.jax_default_matmul_precision),
        }
    if device.platform == "cpu" and _threads_at_start:
        found["NPROC"] = str(_threads_at_start[0])
    return found | {name: os.environ[name] for name in names if name in os.environ and name not in found}
