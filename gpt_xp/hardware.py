"""What makes runs differ, and what to expect of them: settings, memory, and the speed that memory allows.

To decode a token every weight is read once, and little is computed with it. The bytes that a device reads in a second,
divided by those of the params, are therefore the most tokens per second that can be decoded (in one row, and as long as
the params are larger than the processor's caches).
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
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.registry import get_backend
from gpt_xp.types import Array, Namespace

SMALLEST, LARGEST = 2**14, 2**15  # rows of the float32 matrix that is read: 1 GB, more than processors cache, and 4 GB
LONG_ENOUGH = 5e-3  # seconds to read it in, so that the time to begin does not count


@dataclass(frozen=True)
class Outlook:
    """What to expect of one model in one dtype.

    `needed` is the bytes of its params and of the cache of one row at full context; `fits` is None where the device's
    memory is not known; `decode_limit` is in tokens per second.
    """

    model: str
    dtype: str
    needed: int
    fits: bool | None
    decode_limit: float


@dataclass(frozen=True)
class Diagnosis:
    """One backend on its default device; `bandwidth` is what it reads there, in bytes per second.

    Where it cannot be used after all, `problem` says why, and the rest is empty.
    """

    backend: str
    device: DeviceInfo | None = None
    settings: dict[str, str] | None = None
    bandwidth: float | None = None
    models: tuple[Outlook, ...] = ()
    problem: str | None = None


def diagnose(infos: Sequence[BackendInfo]) -> list[Diagnosis]:
    """Examine each of the `gpt_xp.backends()` that can be used, for a second or two.

    All are in this process. None computes while another is measured, but JAX goes on holding most of a GPU's memory.
    """
    return [_diagnose(info) for info in infos if info.problem is None]


def outlook(model: str, config: GPT2Config, dtype: str, memory: int | None, bandwidth: float) -> Outlook:
    """Compare what a model needs with what a device has."""
    params = config.n_params * ITEM_SIZE[dtype]
    cache = 2 * config.n_layer * config.n_ctx * config.n_embd * ITEM_SIZE[dtype]  # keys and values
    fits = None if memory is None else params + cache <= memory
    return Outlook(model, dtype, params + cache, fits, bandwidth / params)


def measure_bandwidth(backend: Backend, seconds: float = 1.0) -> float:
    """Return the bytes per second that `backend` reads of a large matrix, in the faster of two ways.

    The ways are those of decoding, a product with a vector, and a sum: libraries differ in which is the faster.
    """
    # Not zeros: of those, Linux would hand out one page of memory again and again.
    make = backend.compile(_ones, static=("rows", "columns", "xp"))
    like = backend.asarray(np.zeros(1, dtype=np.float32))
    side = _fitting(SMALLEST, backend.device_memory)
    while True:
        vector = make(like=like, rows=1, columns=side, xp=backend.xp)
        matrix = make(like=like, rows=side, columns=side, xp=backend.xp)
        duration = min(_shortest(backend, way, seconds / 2, vector, matrix) for way in (_product, _sum))
        larger = _fitting(min(2 * side, LARGEST), backend.device_memory)
        if duration >= LONG_ENOUGH or larger <= side:
            return side * side * ITEM_SIZE["float32"] / duration
        side = larger


def _diagnose(info: BackendInfo) -> Diagnosis:
    try:
        backend = get_backend(info.name)
    except BackendError as error:
        return Diagnosis(info.name, problem=str(error))
    device = {each.name: each for each in info.devices}.get(backend.device)
    device = device or DeviceInfo(backend.device, "", backend.device_memory)
    bandwidth = measure_bandwidth(backend)
    models = tuple(
        outlook(name, model.config, dtype, device.memory, bandwidth)
        for name, model in MODELS.items()
        for dtype in ITEM_SIZE
        if _computes_in(info.name, dtype)
    )
    return Diagnosis(info.name, device, backend.settings(), bandwidth, models)


def _computes_in(backend: str, dtype: str) -> bool:
    try:
        get_backend(backend, dtype=dtype)
    except BackendError:
        return False
    return True


def _fitting(side: int, memory: int | None) -> int:
    """Halve `side` until such a matrix takes no more than an eighth of `memory`."""
    while memory and side > 1 and side * side * ITEM_SIZE["float32"] > memory / 8:
        side //= 2
    return side


def _shortest(backend: Backend, function: Callable[..., Array], seconds: float, vector: Array, matrix: Array) -> float:
    """Return the shortest of the times that `function` takes in about `seconds`, once it has been compiled."""
    run = backend.compile(function, static=("xp",))
    times: list[float] = []
    for _ in range(2):  # the first to compile, and to fill what the library fills
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
