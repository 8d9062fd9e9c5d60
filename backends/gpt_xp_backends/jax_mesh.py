"""JAX on a mesh of devices, in one process or several.

`transformer.py` does not know about the mesh. Weights, cache and tokens are placed on it, and XLA finds where the
devices must communicate: two sums over the axis `model` in each block. For that, `c_attn` must be split by heads. So
the namespace takes such a weight in `matmul`, as the namespace of quantized weights does, and pads heads and
vocabulary with zeros where the mesh does not divide them.
"""

import contextlib
import functools
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError, GptXpWarning, SettingError
from gpt_xp.kv_cache import KVCache
from gpt_xp.mesh import Hosts, MeshShape, Split, launched_processes, padded_heads, splits
from gpt_xp.quantization import Quantized, QuantizedNamespace
from gpt_xp.tree import tree_map
from gpt_xp.types import Array, NumpyArray, Params
from gpt_xp_backends.jax_backend import JaxBackend, find_devices, on_accelerators
from gpt_xp_backends.jax_mesh_namespace import Heads, Table, flat, mesh_namespace, placement

JOIN_SECONDS = 300  # A process waits so long for the others to start.
LOST = re.compile("gloo|nccl|coordination|unavailable|deadline|connection|peer|heartbeat", re.IGNORECASE)
HEARTBEAT_SECONDS = 20  # Processes end so long after one of them has become silent.


class JaxMeshBackend(JaxBackend):
    """JAX on a mesh of the devices of one platform ("cpu", "cuda"; default: JAX's first)."""

    def __init__(
        self,
        shape: MeshShape,
        hosts: Hosts | None = None,
        device: str | None = None,
        dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        _join(hosts)
        self._mesh = _make_mesh(shape, device)
        super().__init__(device, dtype, threads)
        sizes = self._mesh.shape
        self._shape = MeshShape(sizes["data"], sizes["model"])
        self.device = f"mesh {str(self._shape).replace(',', ' ')} of {self._device.platform}"
        if self.device_memory and self._device.platform != "cpu":
            self.device_memory *= self._shape.n_devices
        self.process_index, self.process_count = jax.process_index(), jax.process_count()
        vars(self).update(on_accelerators() | {"xp": mesh_namespace(self._mesh)})
        self._everywhere = jax.jit(lambda x: x, out_shardings=placement(self._mesh))
        self._longer = self.compile(_longer, static=("n_slots",))
        self._connect()

    def _choose_device(self, name: str | None) -> Any:
        return self._mesh.local_devices[0]

    def _connect(self) -> None:
        """Let all devices exchange something, while the processes are in step.

        Between CPUs, the first exchange of each group of devices fails if a process comes 30 seconds late.
        """
        if self.process_count > 1:
            for axes in (("data",), ("model",), ("data", "model")):
                placed = self._put(np.ones(self._mesh.devices.shape, np.int32), ("data", "model"))
                axis = tuple(self._mesh.axis_names.index(name) for name in axes)
                self.synchronize(jax.jit(functools.partial(jnp.sum, axis=axis))(placed))
            self.wait_for_others("all processes have joined")

    # --- arrays ---

    def asarray(self, array: Any, dtype: str | None = None) -> Array:
        """Return an array on the mesh. Its rows are split over the axis `data` if that divides them.

        The rows are the first axis, or the second of three ([k, batch, n]). This changes no result.
        """
        if isinstance(array, jax.Array) and array.sharding.device_set == set(self._mesh.devices.flat):
            with self._scope():
                return array if dtype is None else array.astype(dtype)
        array = np.asarray(array)
        axis = 1 if array.ndim == 3 else 0
        # A mask of the vocabulary has no rows.
        is_split = array.ndim > 0 and array.dtype != np.bool_ and array.shape[axis] % self._mesh.shape["data"] == 0
        return self._put(array, (*[None] * axis, "data") if is_split else (), dtype)

    def to_numpy(self, array: Array) -> NumpyArray:
        """Return an array of JAX as a NumPy array, with the parts that other processes hold."""
        with self._lost_processes():
            return np.asarray(array if array.is_fully_addressable else self._everywhere(array))

    def unplaced(self, params: Params, config: GPT2Config) -> Params:
        """Return params in the checkpoint's shapes, also those of `place`."""
        return self.fetch(params, config) if isinstance(params.get("wte"), Table) else params

    def place(self, params: Params, config: GPT2Config) -> Params:
        """Return the params, split as `gpt_xp.mesh.splits` says. Each process reads only its part of a mapped file."""
        if isinstance(params["wte"], Quantized):
            return tree_map(self._replicated, params)  # type: ignore[no-any-return]
        padded = padded_heads(config, self._mesh.shape["model"])
        if 3 * padded > 4 * config.n_head:
            warnings.warn(
                f"the mesh {self._shape} pads {config.n_head} heads to {padded}, and the additional ones are computed "
                "for nothing: fewer devices on the axis model would be faster",
                GptXpWarning,
                stacklevel=2,
            )
        return _map(self._placed, splits(config), params)  # type: ignore[no-any-return]

    def fetch(self, params: Params, config: GPT2Config) -> Params:
        """Return params of `place` as NumPy arrays of the checkpoint's shapes."""
        if not isinstance(params["wte"], Table):
            return super().fetch(params, config)
        return _map(self._fetched, splits(config), params)  # type: ignore[no-any-return]

    def shard(self, leaf: Any, dtype: str | None = None) -> Array:
        """Return an array of the state of training, split over the axis `data` (see `_split_over_data`)."""
        array = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
        return self._put(array, _split_over_data(array.shape, self._mesh.shape["data"]), dtype)

    def constrain(self, leaf: Array) -> Array:
        """Return the array of a compiled program, placed as `shard` places it."""
        spec = _split_over_data(leaf.shape, self._mesh.shape["data"])
        return jax.lax.with_sharding_constraint(leaf, placement(self._mesh, *spec))  # type: ignore[no-untyped-call]

    def quantized(self) -> "JaxMeshBackend":
        """Return the same backend with a namespace for quantized weights, which each device holds as a whole."""
        if self._mesh.shape["model"] > 1:
            raise BackendError(
                f"quantized weights cannot be split over the {self._mesh.shape['model']} devices of the axis model: "
                "take data=N alone, or leave out quantize"
            )
        return self.replace(xp=QuantizedNamespace(self.xp, self.dtype), takes_quantized=True)

    # --- the cache and the batch ---

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array) -> KVCache:
        """Return an empty cache [batch, n_head, n_slots, d_head], split by rows and heads."""
        data, n_model = self._mesh.shape["data"], self._mesh.shape["model"]
        batch = start.shape[0]
        shape = batch, padded_heads(config, n_model), n_slots, config.n_embd // config.n_head
        where = placement(self._mesh, "data" if batch % data == 0 else None, "model")
        with self._scope():
            layers = [
                tuple(jnp.zeros(shape, like.dtype, device=where) for _ in range(2)) for _ in range(config.n_layer)
            ]
        return KVCache(layers, 0, start)  # type: ignore[arg-type]

    def grow_cache(self, cache: KVCache, n_slots: int) -> KVCache:
        """Return the cache with `n_slots` slots. Each array is replaced in turn, so memory never holds two caches."""
        for i, (k, v) in enumerate(cache.layers):
            cache.layers[i] = self._longer(k, n_slots=n_slots), self._longer(v, n_slots=n_slots)
        return cache

    def full_batch(self, rows: int) -> int:
        """Return the next multiple of the axis `data`, so that each device computes as many rows."""
        data: int = self._mesh.shape["data"]
        return -(-rows // data) * data

    # --- several processes ---

    def agreed(self, number: int) -> int:
        """Return the number (below 2^32) of process 0."""
        if self.process_count == 1:
            return number
        with self._lost_processes():
            return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))

    def check_agreement(self, work: Any) -> None:
        """Raise `BackendError` where processes were given different work. They would hang, or mix two texts."""
        if self.process_count == 1:
            return
        with self._lost_processes():
            found = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(work).encode())))
        if len(set(np.asarray(found).tolist())) > 1:
            raise BackendError(
                f"the {self.process_count} processes were given different work: start all of them with the same "
                "options, prompts and files"
            )

    def wait_for_others(self, place: str) -> None:
        """Wait until all processes have come to this place of the program."""
        if self.process_count > 1:
            with self._lost_processes():
                multihost_utils.sync_global_devices(place)

    def compile(
        self, function: Callable[..., Any], static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function compiled for the mesh."""
        compiled = super().compile(function, static, donate)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lost_processes():
                return compiled(*args, **kwargs)

        return call

    def synchronize(self, array: Array) -> None:
        """Wait until the array is computed."""
        with self._lost_processes():
            super().synchronize(array)

    def settings(self) -> dict[str, str]:
        """Return the mesh and the settings of `JaxBackend`."""
        return {"mesh": str(self._shape)} | super().settings()

    @contextlib.contextmanager
    def _lost_processes(self) -> Iterator[None]:
        """Raise `BackendError` if the body fails because another process cannot be reached."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self.process_count == 1 or self.is_out_of_memory(error) or not LOST.search(str(error)):
                raise
            raise BackendError(
                f"another of the {self.process_count} processes has died or cannot be reached "
                f"({str(error).splitlines()[0]:.200}): see what it wrote, and start all of them again"
            ) from None

    # --- placing weights ---

    def _put(self, array: Any, spec: tuple[str | None, ...], dtype: Any = None, shape: Any = None) -> Array:
        """Return an array on the mesh, padded with zeros to `shape`. Only the parts for this process are read."""
        shape = shape or array.shape
        with self._scope():
            dtype = jax.dtypes.canonicalize_dtype(dtype or array.dtype)

            def read(index: Any) -> NumpyArray:  # a slice for each axis
                part = np.asarray(array[index], dtype)
                wanted = [len(range(*one.indices(n))) for one, n in zip(index, shape, strict=True)]
                missing = [(0, want - has) for want, has in zip(wanted, part.shape, strict=True)]
                return np.pad(part, missing) if any(map(any, missing)) else part

            return jax.make_array_from_callback(shape, placement(self._mesh, *spec), read)

    def _replicated(self, leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return type(leaf)(*(self._put(np.asarray(each), ()) for each in leaf))
        return self._put(np.asarray(leaf), (), self.dtype)

    def _placed(self, name: str, split: Split, leaf: Any) -> Any:
        spec = () if split.axis is None else (*[None] * split.axis, "model")
        whole = np.asanyarray(leaf).reshape(split.shape)
        array = self._put(whole, spec, self.dtype, split.padded(self._mesh.shape["model"]))
        if name == "wte":
            return Table(array, split.shape[0])
        return Heads(array) if name == "c_attn" else array

    def _fetched(self, name: str, split: Split, leaf: Any) -> NumpyArray:
        array = self.to_numpy(leaf.array if isinstance(leaf, Heads | Table) else leaf)
        if self.dtype == "bfloat16":
            array = array.astype(np.float32)
        array = array[tuple(map(slice, split.shape))]
        return array.reshape(flat(split.shape)) if name == "c_attn" else array


def _longer(x: Array, n_slots: int) -> Array:
    """Return keys or values [batch, n_head, n_before, d_head] with zeros in more slots."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, n_slots - x.shape[2]), (0, 0)))


def _map(function: Callable[[str, Split, Any], Any], split: Any, tree: Any, name: str = "") -> Any:
    """Return the tree with `function(name, split, leaf)` for each leaf. The name is that of the layer, or "wte"."""
    if isinstance(split, dict):
        return {key: _map(function, split[key], tree[key], name if key in ("w", "b", "g") else key) for key in split}
    if isinstance(split, list):
        return [_map(function, *each, name) for each in zip(split, tree, strict=True)]
    return function(name, split, tree)


def _split_over_data(shape: tuple[int, ...], n_data: int) -> tuple[str | None, ...]:
    """Return how an array of the state of training is split: by the longest axis that the mesh divides, if any."""
    fitting = [axis for axis, n in enumerate(shape) if n % n_data == 0 and n >= n_data]
    if not fitting:
        return ()
    longest = max(fitting, key=lambda axis: shape[axis])
    return (*[None] * longest, "data")


def _make_mesh(shape: MeshShape, device: str | None) -> Mesh:
    """Return a mesh of the devices of a platform. Raises `BackendError` if there are too few, or too many."""
    platform, _, index = (device or "").partition(":")
    if index:
        raise BackendError(f"a mesh takes all devices of a platform, not {device!r} alone: name it {platform!r}")
    devices = jax.devices(find_devices(jax, platform or None)[0].platform)
    try:
        shape = shape.fitted_to(len(devices))
    except SettingError as error:
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={shape.n_devices}"
        trial = "" if jax.process_count() > 1 else f"; for a trial on a CPU, {flag} makes more of them"
        raise BackendError(f"{error}{trial}") from None
    if jax.process_count() > 1 and shape.n_devices != len(devices):
        raise BackendError(
            f"the mesh {shape} has {shape.n_devices} devices, and with several processes it must have all "
            f"{len(devices)} of them: take data={len(devices)}, or another mesh of that many"
        )
    sizes, used = (shape.n_devices // shape.model, shape.model), devices[: shape.n_devices]
    # Axes are Explicit by default, and then `transformer.py` would have to say how each result is split.
    return jax.make_mesh(sizes, ("data", "model"), (AxisType.Auto,) * 2, devices=used)


def _join(hosts: Hosts | None) -> None:
    """Join the processes that share the mesh, unless this is done, or there is only one."""
    if jax.distributed.is_initialized() or (hosts is None and launched_processes()[0] < 2):
        return
    named: dict[str, Any] = {}
    if hosts is not None:
        named = {
            "coordinator_address": hosts.address,
            "coordinator_bind_address": hosts.address,  # By default it would listen on every address.
            "num_processes": hosts.count,
            "process_id": hosts.index,
            "cluster_detection_method": "deactivate",
        }
    config: Any = jax.config
    before = config.jax_enable_preemption_service
    try:
        config.update("jax_enable_preemption_service", False)  # It would take SIGTERM, which then ends nothing.
        jax.distributed.initialize(
            **named, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError.
        fix = "; name them: hosts ADDRESS:PORT,COUNT,INDEX"
        if hosts:
            fix = f": is {hosts.address} an address of process 0 with a free port, and has each process its own INDEX?"
        reason = str(error).partition("\n")[0]
        raise BackendError(f"the processes cannot be joined ({reason:.200}){fix}") from None
    finally:
        config.update("jax_enable_preemption_service", before)
