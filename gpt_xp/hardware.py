"""Reports on each backend: its settings, its memory, which models fit, and the fastest possible decode.

To decode a token, every weight is read once, and little is computed with it. So the bytes that a device reads in a
second, divided by the bytes of the params, limit the tokens per second of decode. This holds for one row, and for
params that are larger than the processor's caches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt_xp.arrays import device_of
from gpt_xp.backend import Backend, BackendInfo, DeviceInfo
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError
from gpt_xp.hub.published import MODELS
from gpt_xp.memory import ITEM_SIZE, cache_bytes
from gpt_xp.mesh import MeshShape, cache_bytes_on_device, params_bytes_on_device
from gpt_xp.registry import get_backend
from gpt_xp.types import Array, Namespace

# Rows of the square float32 matrix that is read: 1 GB, which is more than processors cache, and 4 GB.
SMALLEST_MATRIX, LARGEST_MATRIX = 2**14, 2**15
LEAST_SECONDS = 5e-3  # Reading the matrix takes at least so long, so that the time to start it does not matter.


@dataclass(frozen=True)
class ModelFit:
    """The memory that one model needs in one dtype on a device, and the fastest possible decode there.

    `needed` is the bytes of its params and of the cache of one row at full context. `fits` is None if the device's
    memory is not known. `decode_limit` is in tokens per second.
    """

    model: str
    dtype: str
    needed: int
    fits: bool | None
    decode_limit: float


@dataclass(frozen=True)
class BackendReport:
    """The report on one backend on its default device; `bandwidth` is in bytes per second.

    If the backend cannot be used, `problem` says why, and the other fields are empty.
    """

    backend: str
    device: DeviceInfo | None = None
    settings: dict[str, str] | None = None
    bandwidth: float | None = None
    models: tuple[ModelFit, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class MeshFit:
    """The bytes that one model needs on each device of a mesh: its params, and the cache of one row at full context.

    A device computes one of `data` parts of the rows of a batch. `fits` is None if the memory of a device is not known.
    """

    model: str
    dtype: str
    params: int
    cache: int
    fits: bool | None


def mesh_fits(shape: MeshShape, dtypes: Sequence[str], memory: int | None) -> list[MeshFit]:
    """Return what each published model needs on a mesh, with devices of `memory` bytes."""
    return [
        MeshFit(name, dtype, params, cache, None if memory is None else params + cache <= memory)
        for name, model in MODELS.items()
        for dtype in dtypes
        for params in [params_bytes_on_device(model.config, shape, dtype)]
        for cache in [cache_bytes_on_device(model.config, shape, dtype)]
    ]


def report_on_backends(infos: Sequence[BackendInfo]) -> list[BackendReport]:
    """Measure each usable backend of `gpt_xp.backends()` for a second or two, and return a report on each.

    All of them run in this process, one after the other. JAX keeps most of a GPU's memory after its turn.
    """
    return [_report(info) for info in infos if info.problem is None]


def model_fit(model: str, config: GPT2Config, dtype: str, memory: int | None, bandwidth: float) -> ModelFit:
    """Compare the memory that a model needs with a device's `memory` in bytes; `bandwidth` is in bytes per second."""
    params = config.n_params * ITEM_SIZE[dtype]
    cache = cache_bytes(config, rows=1, n_slots=config.n_ctx, dtype=dtype)
    fits = None if memory is None else params + cache <= memory
    return ModelFit(model, dtype, params + cache, fits, bandwidth / params)


def measure_bandwidth(backend: Backend, seconds: float = 1.0) -> float:
    """Return the bytes per second at which `backend` reads a large matrix, in the faster of two ways.

    The ways are a product with a vector, as in decoding, and a sum. Libraries differ in which is faster.
    """
    # The matrix holds ones, because Linux maps a matrix of zeros to one single page of memory.
    make = backend.compile(_ones, static=("rows", "columns", "xp"))
    like = backend.asarray(np.zeros(1, dtype=np.float32))
    side = _fitting(SMALLEST_MATRIX, backend.device_memory)
    while True:
        vector = make(like=like, rows=1, columns=side, xp=backend.xp)
        matrix = make(like=like, rows=side, columns=side, xp=backend.xp)
        duration = min(_shortest(backend, way, seconds / 2, vector, matrix) for way in (_product, _sum))
        larger = _fitting(min(2 * side, LARGEST_MATRIX), backend.device_memory)
        if duration >= LEAST_SECONDS or larger <= side:
            return side * side * ITEM_SIZE["float32"] / duration
        side = larger


def _report(info: BackendInfo) -> BackendReport:
    try:
        backend = get_backend(info.name)
    except BackendError as error:
        return BackendReport(info.name, problem=str(error))
    device = {each.name: each for each in info.devices}.get(backend.device)
    device = device or DeviceInfo(backend.device, "", backend.device_memory)
    bandwidth = measure_bandwidth(backend)
    models = tuple(
        model_fit(name, model.config, dtype, device.memory, bandwidth)
        for name, model in MODELS.items()
        for dtype in ITEM_SIZE
        if _computes_in(info.name, dtype)
    )
    return BackendReport(info.name, device, backend.settings(), bandwidth, models)


def _computes_in(backend: str, dtype: str) -> bool:
    try:
        get_backend(backend, dtype=dtype)
    except BackendError:
        return False
    return True


def _fitting(side: int, memory: int | None) -> int:
    """Return `side`, halved until a square matrix takes at most an eighth of `memory`."""
    while memory and side > 1 and side * side * ITEM_SIZE["float32"] > memory / 8:
        side //= 2
    return side


def _shortest(backend: Backend, function: Callable[..., Array], seconds: float, vector: Array, matrix: Array) -> float:
    """Return the shortest time of one call of `function`, which is compiled and then called for `seconds`."""
    run = backend.compile(function, static=("xp",))
    times: list[float] = []
    for _ in range(2):  # The first calls compile, and fill the library's own caches.
        backend.synchronize(run(vector, matrix, xp=backend.xp))
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        backend.synchronize(run(vector, matrix, xp=backend.xp))
        times.append(time.perf_counter() - begin)
    return min(times)


def _ones(like: Array, rows: int, columns: int, xp: Namespace) -> Array:
    return xp.ones((rows, columns), dtype=xp.float32, device=device_of(like))


def _product(vector: Array, matrix: Array, xp: Namespace) -> Array:
    return xp.matmul(vector, matrix)


def _sum(vector: Array, matrix: Array, xp: Namespace) -> Array:
    return xp.sum(matrix)
