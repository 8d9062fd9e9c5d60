"""JAX, on CPUs, GPUs and TPUs, with every step compiled by XLA."""

import contextlib
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from gpt_xp.backend import Backend, BackendInfo, DecodeStep, DeviceInfo, check_dtype, few_sizes, import_library
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError
from gpt_xp.installation import install_command
from gpt_xp.kv_cache import KVCache
from gpt_xp.memory import physical_memory
from gpt_xp.mesh import Hosts, MeshShape
from gpt_xp.types import Array, Namespace
from gpt_xp_backends.jax_programs import keep_compiled

GPU_FIX = f"for an NVIDIA GPU, {install_command('jax-cuda13')} (for CUDA 12: jax-cuda12)"
FIX = f"{install_command('jax')}; for an NVIDIA GPU, jax-cuda13 or jax-cuda12 in place of jax"
LENGTH_MULTIPLE = 128  # Caches and chunks of longer prompts have multiples of it as lengths, so that few are compiled.
SHORT_PROMPT_TOKENS = 16  # Prompts of up to so many tokens are padded to this length.
CHUNK_TOKENS = 512  # over up to four rows; 512 at once take 0.83 of the time of four times 128


class JaxBackend(Backend):
    """JAX on `device` ("cpu", "gpu", "cuda:1"; default: JAX's first)."""

    name = "jax"
    needs: ClassVar = {"jax": FIX}

    def __init__(self, device: str | None = None, dtype: str = "float32", threads: int | None = None) -> None:
        with contextlib.nullcontext() if threads is None else _starting_with(threads):
            self._jax = jax = import_library("jax", FIX)
            self._device = where = self._choose_device(device)
        # XLA's CPU compiler computes 16-bit products in float32, slower than with float32 params.
        half = () if where.platform == "cpu" else ("bfloat16", "float16")
        check_dtype("jax", _name(where), dtype, ("float32", "float64", *half))
        self._scope = functools.partial(_scope, jax, dtype)
        self._compile_seconds = _stopwatch(jax)
        self.version, self.device, self.dtype = jax.__version__, _name(where), dtype
        self.device_memory = _device_info(where).memory
        vars(self).update(on_cpus() if where.platform == "cpu" else on_accelerators())

    @classmethod
    def on_mesh(cls, shape: MeshShape, hosts: Hosts | None, **options: Any) -> Backend:
        """Return JAX on a mesh."""
        threads = options.get("threads")
        with contextlib.nullcontext() if threads is None else _starting_with(threads):
            import_library("jax", FIX)
            from gpt_xp_backends.jax_mesh import JaxMeshBackend

            return JaxMeshBackend(shape, hosts, **options)

    def _choose_device(self, name: str | None) -> Any:
        return _find_device(self._jax, name)

    @classmethod
    def info(cls) -> BackendInfo:
        """Return JAX's version and devices."""
        jax = import_library("jax", FIX)
        try:
            return BackendInfo("jax", jax.__version__, tuple(_device_info(device) for device in _all_devices(jax)))
        except BackendError as error:
            return BackendInfo("jax", jax.__version__, problem=error.problem, fix=error.fix)

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return an array of NumPy or JAX on the device. It is cast there, because NumPy has no bfloat16."""
        with self._scope():
            moved = self._jax.device_put(array, self._device)
            return moved if dtype is None else moved.astype(dtype)

    def to_numpy(self, array: Array) -> "np.ndarray[Any, Any]":
        """Return an array of JAX as a NumPy array."""
        return np.asarray(array)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function compiled by `jax.jit`, which runs under the backend's settings."""
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
        """Return one of few sizes, because each is compiled separately."""
        return min(few_sizes(n_tokens), -(-n_ctx // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache, made under the backend's settings, which float64 needs."""
        with self._scope():
            return super().new_cache(config, like, n_slots, start)

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with `n_slots` slots, grown under the backend's settings, which float64 needs."""
        with self._scope():
            return super().grow_cache(cache, n_slots)

    def chunk_tokens(self, batch: int) -> int:
        """Return a multiple of `LENGTH_MULTIPLE`."""
        return max(CHUNK_TOKENS // batch // LENGTH_MULTIPLE, 1) * LENGTH_MULTIPLE

    def padded_length(self, n_tokens: int, n_prompt: int) -> int:
        """Return one of few lengths, because each is compiled separately."""
        if n_prompt <= SHORT_PROMPT_TOKENS:
            return SHORT_PROMPT_TOKENS
        return -(-n_tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether XLA reports a lack of memory."""
        return "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)

    def peak_memory(self) -> int | None:
        """Return the peak memory of the device if it is counted, else of the process."""
        stats = self._device.memory_stats()
        return stats.get("peak_bytes_in_use") if stats else super().peak_memory()

    def compile_seconds(self) -> float:
        """Return the seconds spent on tracing and compiling."""
        return self._compile_seconds()

    def keep_compiled(self) -> None:
        """Keep compiled programs in the user's cache folder."""
        keep_compiled(self._jax)

    def settings(self) -> dict[str, str]:
        """Return the versions, precision and environment variables that affect XLA."""
        return _settings(self._jax, self._device, self._scope)


def on_cpus() -> dict[str, Any]:
    """Return the backend's attributes on a CPU, where a step takes longer than its dispatch."""
    return {"xp": _namespace_for_cpus(), "decode_block": None, "samples_on_host": True}


def on_accelerators() -> dict[str, Any]:
    """Return the backend's attributes on a GPU or TPU, where blocks of steps run without the host."""
    import jax.numpy

    return {"xp": jax.numpy, "decode_block": decode_block, "samples_on_host": False}


def decode_block(step: DecodeStep, state: Any, k: int) -> tuple[Any, Any]:
    """Run `step` k times as one program; see `Backend.decode_block`."""
    import jax

    final, outputs = jax.lax.scan(lambda state, _: step(state), state, length=k)
    return final, outputs


@functools.cache  # JAX would compile again for another namespace object.
def _namespace_for_cpus() -> Namespace:
    """Return jax.numpy with a `matmul` that reads the cache without a copy, for the one query of a decode step.

    XLA's CPU compiler is slow for such products of more than three axes, and it copies transposed keys first. The same
    product written as keys times query needs no copy.
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
    """Apply the settings that gpt-xp needs to JAX, without changing the user's own.

    float32 products are computed in float32 (the default on GPUs is TF32), and a float64 backend allows float64. Rank
    promotion is allowed, because a bias [n] is added to rows [rows, n].
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if dtype == "float64":
            stack.enter_context(jax.enable_x64(True))
        yield


def _all_devices(jax: Any) -> list[Any]:
    """Return JAX's devices in this process, its default first. Raises `BackendError` if there are none."""
    try:
        found = list(jax.local_devices())
    except (RuntimeError, AssertionError) as error:  # JAX has no special error for this.
        setting = os.environ.get("JAX_PLATFORMS", "")
        raise BackendError(
            f"jax cannot start on JAX_PLATFORMS={setting!r}{f' ({error})' if str(error) else ''}",
            f"unset that variable; {GPU_FIX}",
        ) from None
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may exclude the CPU.
        found += [device for device in jax.local_devices(backend="cpu") if device not in found]
    return found


def _find_device(jax: Any, name: str | None) -> Any:
    """Return the device called `name`: "cuda:1", or the first device of the platform "cuda", "gpu", "tpu" or "cpu"."""
    platform, _, index = (name or "").partition(":")
    found = find_devices(jax, platform or None, name)
    try:
        return dict(enumerate(found))[int(index or 0)]
    except (KeyError, ValueError):  # an unknown index, no number
        raise _no_device(jax, name) from None


def find_devices(jax: Any, platform: str | None, name: str | None = None) -> list[Any]:
    """Return this process's devices of a platform ("cpu", "gpu", "cuda", "tpu"; None: JAX's first).

    Raises `BackendError`, which names the device that was asked for (default: the platform).
    """
    devices = _all_devices(jax)
    try:
        return list(jax.local_devices(backend=platform or devices[0].platform))
    except RuntimeError:  # an unknown platform
        raise _no_device(jax, name or platform) from None


def _no_device(jax: Any, name: str | None) -> BackendError:
    names = ", ".join(map(_name, _all_devices(jax)))
    cause = f"; {GPU_FIX}" if str(name).partition(":")[0] in ("gpu", "cuda") else ""
    return BackendError(f"jax has no device {name!r} here, only {names}{cause}")


def _name(device: Any) -> str:
    if device.platform == "cpu" and device.id == 0:
        return "cpu"
    return f"{'cuda' if device.platform == 'gpu' else device.platform}:{device.id}"


def _device_info(device: Any) -> DeviceInfo:
    if device.platform == "cpu":
        return DeviceInfo(_name(device), f"{os.cpu_count()} cores", physical_memory())
    stats = device.memory_stats() or {}
    return DeviceInfo(_name(device), device.device_kind, stats.get("bytes_limit"))


_threads_at_start: list[int] = []  # the number of threads that gpt-xp started XLA with; empty if it chose none


@contextlib.contextmanager
def _starting_with(threads: int) -> Iterator[None]:
    """Start JAX in the body with this number of threads. XLA reads NPROC once, when it makes its thread pool."""
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
    finally:  # Other libraries and child processes read the variable too.
        os.environ.pop("NPROC")
        if before is not None:
            os.environ["NPROC"] = before


@functools.cache
def _stopwatch(jax: Any) -> Callable[[], float]:
    """Return a function that returns the seconds that JAX has spent on tracing and compiling."""
    spent = [0.0]

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def _settings(jax: Any, device: Any, scope: Callable[..., Any]) -> dict[str, str]:
    names = ["XLA_FLAGS", "JAX_PLATFORMS"]
    if device.platform == "cpu":
        names += ["NPROC"]
    else:  # These set how much of a GPU's memory JAX reserves.
        names += [f"XLA_PYTHON_CLIENT_{name}" for name in ("PREALLOCATE", "MEM_FRACTION", "ALLOCATOR")]
    with scope():
        found = {
            "platform": " ".join(device.client.platform_version.split()),  # It includes CUDA's version on a GPU.
            "jaxlib": importlib.metadata.version("jaxlib"),
            "matmul_precision": str(jax.config.jax_default_matmul_precision),
        }
    if device.platform == "cpu" and _threads_at_start:
        found["NPROC"] = str(_threads_at_start[0])
    return found | {name: os.environ[name] for name in names if name in os.environ and name not in found}
