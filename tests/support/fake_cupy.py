"""NumPy in place of CuPy, for tests without a GPU: its graph repeats a call with the arrays of the capture."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_by_numpy import ByNumPy
from gpt_xp_backends.tracing import Tracer
from small_models import CONFIGS, small_params

from gpt_xp import Backend, Generation, Model
from gpt_xp.kv_cache import KVCache
from gpt_xp.tolerances import TOLERANCE


class FakeCuPy:
    """NumPy with CUDA's streams and graphs. `log` says what happened, and `break_at` what fails."""

    def __init__(self, kernels: ByNumPy) -> None:
        self.__version__, self.int32, self.RawKernel = "14", np.int32, kernels
        self.full, self.empty, self.asarray, self.asnumpy = np.full, np.empty, np.asarray, np.asarray
        self.log: list[str] = []
        self.break_at: dict[str, Callable[[], None]] = {}
        self.capturing, self.recorded = False, None
        self.pools: list[Any] = []
        self.freed = 0  # pools that have given their memory back
        self.device = 0  # the current one
        self.waited: list[int] = []  # devices whose stream was waited for
        self.warm_up: Callable[[], Any] = lambda: None  # the logits of the latest run of a step by kernels
        runtime = SimpleNamespace(
            getDeviceCount=lambda: 2, getDeviceProperties=lambda index: {"name": b"none", "totalGlobalMem": 2**40},
            driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13000,
            deviceSynchronize=lambda: self.happens("sync"),
        )  # fmt: skip
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=functools.partial(FakeDevice, self), Stream=functools.partial(FakeStream, self),
            MemoryPool=functools.partial(FakePool, self), using_allocator=self.using_allocator,
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: self.waited.append(self.device)),
        )  # fmt: skip
        self.get_default_memory_pool = lambda: SimpleNamespace(total_bytes=lambda: 7)

    def happens(self, what: str) -> None:
        self.log.append(what)
        if what in self.break_at:
            self.break_at[what]()

    @contextlib.contextmanager
    def using_allocator(self, malloc: Any) -> Iterator[None]:
        self.pools.append(malloc)
        yield
        self.pools.append(None)

    def matmul(self, x: Any, w: Any) -> Any:
        raise NotImplementedError("cuBLAS, in a capture")

    def record(self, *arguments: Any) -> Callable[..., Any]:
        return functools.partial(replayed, *arguments)

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A step as CUDA sees it: in a capture nothing is computed, and every array it made is yet to be filled."""

        @functools.wraps(function)
        def call(params: Any, tokens: Any, cache: Any, *rest: Any, xp: Any, **options: Any) -> Any:
            by_kernel = isinstance(xp, Tracer)
            assert by_kernel == isinstance(cache.position, np.ndarray), "the plain step is as it always was"
            if tokens.shape[1] == 1 and not self.capturing:
                self.happens("run" if by_kernel else "step")
            if not self.capturing:
                result = function(params, tokens, cache, *rest, xp=xp, **options)
                if by_kernel:
                    self.warm_up = weakref.ref(result[0])
                return result
            if "capture" in self.break_at:
                self.break_at["capture"]()
            before = [x.copy() for x in arrays_of(cache)]
            logits, after = function(params, tokens, cache, *rest, xp=xp, **options)
            for x, old in zip(arrays_of(cache), before, strict=True):
                x[...] = old
            logits[...] = np.nan
            addresses, state = [Address(x) for x in (logits, *arrays_of(cache))], (*cache[1:], type(cache))
            self.recorded = self.record(function, params, tokens, state, rest, xp, options), addresses
            return logits, after

        return call


def replayed(function: Any, params: Any, tokens: Any, state: Any, rest: Any, xp: Any, options: Any, *kv: Any) -> Any:
    *position_and_start, cache_type = state
    layers = list(zip(kv[::2], kv[1::2], strict=True))
    return function(params, tokens, cache_type(layers, *position_and_start), *rest, xp=xp, **options)[0]


def arrays_of(cache: KVCache) -> list[np.ndarray]:
    return [x for layer in cache.layers for x in layer]


class Address:
    """The address of an array, as a graph holds it. It keeps no array alive."""

    def __init__(self, x: np.ndarray) -> None:
        whole = x if x.base is None else x.base
        self.whole, self.offset = weakref.ref(whole), x.ctypes.data - whole.ctypes.data
        self.layout = x.shape, x.strides

    def array(self) -> np.ndarray:
        shape, strides = self.layout
        return np.ndarray(shape, self.whole().dtype, self.whole(), self.offset, strides)


class FakeDevice:
    """A device, the current one by default, and the current one while it is entered."""

    def __init__(self, cupy: FakeCuPy, index: int | None = None) -> None:
        self.cupy, self.index, self.before = cupy, cupy.device if index is None else index, []

    def __enter__(self) -> None:
        self.before.append(self.cupy.device)
        self.cupy.device = self.index

    def __exit__(self, *error: object) -> None:
        self.cupy.device = self.before.pop()


class FakePool:
    """A pool gives back the memory of the current device alone."""

    def __init__(self, cupy: FakeCuPy) -> None:
        self.cupy, self.device, self.malloc, self.total_bytes = cupy, cupy.device, object(), lambda: 1000

    def free_all_blocks(self) -> None:
        self.cupy.freed += self.cupy.device == self.device


class FakeStream:
    def __init__(self, cupy: FakeCuPy, non_blocking: bool) -> None:
        assert non_blocking, "the default stream would wait for it, and that cannot be captured"
        self.cupy = cupy

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        self.cupy.happens("wait")

    def begin_capture(self) -> None:
        self.cupy.happens("begin")
        assert self.cupy.warm_up() is None, "the capture needs the memory of the run before it"
        assert self.cupy.pools[-1] is not None, "arrays of the graph would be in the memory of all"
        self.cupy.capturing = True

    def end_capture(self) -> Any:
        self.cupy.capturing = False
        self.cupy.happens("end")
        if self.cupy.recorded is None:
            raise ValueError("the capture is invalidated")
        return FakeGraph(self.cupy)


class FakeGraph:
    def __init__(self, cupy: FakeCuPy) -> None:
        self.cupy = cupy
        self.step, self.arrays = cupy.recorded

    def launch(self) -> None:
        logits, *kv = (each.array() for each in self.arrays)
        logits[...] = self.step(*kv)
        self.cupy.happens("launch")


def small(backend: Backend, name: str = "prime") -> Model:
    return Model(small_params(name), CONFIGS[name], backend=backend)


def same(actual: Any, expected: Any) -> None:
    actual, expected = ([each] if isinstance(each, Generation) else each for each in (actual, expected))
    for ours, theirs in zip(actual, expected, strict=True):
        assert min(theirs.margins) > 1e-4
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=20 * TOLERANCE["same", "float32"])
