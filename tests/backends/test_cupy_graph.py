"""Decoding by a CUDA graph: what is captured when, what is replayed, and what happens where it goes wrong.

Without a GPU, NumPy stands in for CuPy, and its graph is a call that is made again with the very arrays of the capture.
`pytest -m gpu` runs the real one.
"""

import contextlib
import functools
import gc
import importlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_by_numpy import ByNumPy
from folders import BENCHMARKS
from gpt_xp_backends.captured_step import BoundStep
from gpt_xp_backends.cupy_backend import CuPyBackend, adapter
from gpt_xp_backends.numpy_backend import namespace
from gpt_xp_backends.tracing import Tracer
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

from gpt_xp import Backend, Generation, Model, kv_cache
from gpt_xp.errors import BackendError
from gpt_xp.generation import decoder
from gpt_xp.kv_cache import KVCache
from gpt_xp.quantization import quantize
from gpt_xp.tolerances import TOLERANCE

TOKENS = small_tokens("prime")[0].tolist()
UNEVEN = [TOKENS[:3], TOKENS[:17], TOKENS[:1]]
STEP, REPLAY = ["step"], ["launch"]
CAPTURE = ["sync", "run", "wait", "begin", "end"]  # "run" is a step by the graph's kernels
MISTRUSTED = [*CAPTURE, "sync", "step"]
COMPARE = ["launch", "sync", "step"]


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
    """Where an array lies: a graph holds addresses, and keeps no array alive."""

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


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCuPy:
    fake = FakeCuPy(ByNumPy(monkeypatch))
    monkeypatch.setattr(adapter, "import_library", lambda name, fix: fake)
    monkeypatch.setattr(adapter, "_namespace", lambda cupy: namespace())
    for name in ("next_token_logits", "candidate_logits"):
        monkeypatch.setattr(decoder, name, fake.watched(getattr(decoder, name)))
    monkeypatch.delenv("GPT_XP_CUPY_GRAPH", raising=False)
    return fake


def small(backend: Backend, name: str = "prime") -> Model:
    return Model(small_params(name), CONFIGS[name], backend=backend)


def same(actual: Any, expected: Any) -> None:
    actual, expected = ([each] if isinstance(each, Generation) else each for each in (actual, expected))
    for ours, theirs in zip(actual, expected, strict=True):
        assert min(theirs.margins) > 1e-4
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=20 * TOLERANCE["same", "float32"])


def graph_setting(model: Model) -> str:
    return model.backend.settings()["cuda_graph"]


def test_the_first_graph_is_compared_and_all_later_steps_are_replayed(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    assert graph_setting(model) == "not yet"
    out = model.generate(TOKENS[:5], max_tokens=2)
    assert cupy.log == MISTRUSTED
    assert graph_setting(model) == "not yet"
    cupy.log.clear()
    out = model.generate(TOKENS[:5], max_tokens=9)
    assert cupy.log == COMPARE + 7 * REPLAY
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert graph_setting(model) == "yes"
    assert None in cupy.pools, "the allocator is put back"
    assert set(cupy.RawKernel.launched) == {"thin_product", "fused"}


@pytest.mark.parametrize(
    "gelu",
    [
        lambda x, xp: 0.5 * x * (1 + xp.tanh(0.79788456 * (x + 0.044715 * x**3))),
        lambda x, xp: 0 * np.asarray(x) + x,  # as a hook that collects numbers
    ],
    ids=["a power", "its numbers"],
)
def test_a_step_that_cannot_be_captured_is_taken_as_it_stands(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, gelu: Any
) -> None:
    monkeypatch.setattr("gpt_xp.transformer.gelu", gelu)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match=r"goes on without a CUDA graph.*GPT_XP_CUPY_GRAPH=0") as warned:
        found = model.generate(TOKENS[:5], max_tokens=9)
    same(found, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert len(warned) == 1
    assert "begin" not in cupy.log
    assert cupy.log[-8:] == 8 * STEP


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5, "top_k": 20}], ids=["greedy", "sampled"])
def test_the_text_is_the_plain_one(cupy: FakeCuPy, options: dict[str, Any]) -> None:
    actual = small(CuPyBackend()).generate(UNEVEN, max_tokens=None, ignore_eos=True, **options)
    # 17 + 37 > 37 slots: the ring begins again.
    same(actual, small(make_backend("numpy")).generate(UNEVEN, max_tokens=None, ignore_eos=True, **options))
    assert cupy.log.count("begin") == 1


def test_each_size_of_the_cache_has_a_graph_of_its_own_which_the_next_generation_finds(cupy: FakeCuPy) -> None:
    prompt = small_tokens("long")[0, :17].tolist()
    model, plain = small(CuPyBackend(), "long"), small(make_backend("numpy"), "long")
    options: dict[str, Any] = {"max_tokens": None, "ignore_eos": True}
    actual = model.generate(prompt, **options)
    assert cupy.log.count("begin") == 3  # of 128, 256 and 307 slots
    assert cupy.log.count("step") == 6  # two for each
    same(actual, plain.generate(prompt, **options))
    # The arrays have 307 slots from now on. Their first 128 and 256 are other arrays than those of that size were.
    options["max_tokens"] = 280
    expected = plain.generate(prompt[:11], **options)
    for log in (CAPTURE + 116 * REPLAY + CAPTURE + 127 * REPLAY + 34 * REPLAY, 279 * REPLAY):
        cupy.log.clear()
        actual = model.generate(prompt[:11], **options)
        assert cupy.log == log
        same(actual, expected)
    cupy.recorded = None
    del model
    gc.collect()
    assert cupy.freed == 5


@pytest.mark.parametrize("lengths", [(1, 17, 3), (11, 2, 29)])
def test_the_next_batch_has_its_own_prompts_and_starts(cupy: FakeCuPy, lengths: tuple[int, ...]) -> None:
    model, prompts = small(CuPyBackend()), [TOKENS[3 : 3 + length] for length in lengths]
    model.generate(UNEVEN, max_tokens=8, ignore_eos=True)
    cupy.log.clear()
    actual = model.generate(prompts, max_tokens=8, ignore_eos=True)
    assert cupy.log == 7 * REPLAY
    same(actual, small(make_backend("numpy")).generate(prompts, max_tokens=8, ignore_eos=True))


def test_a_batch_of_another_size_takes_the_place_of_the_cache_that_is_kept(cupy: FakeCuPy) -> None:
    made: list[list[weakref.ref[Any]]] = []
    backend = CuPyBackend()
    original = backend.new_cache

    def spy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive = {id(array) for cache in made for each in cache if (array := each()) is not None}
        assert len(alive) <= 2 * CONFIGS["prime"].n_layer, "there is never more than one, kept or used"
        cache = original(*args, **kwargs)
        made.append([weakref.ref(x.base) for x in arrays_of(cache)])
        return cache

    model = small(backend.replace(new_cache=spy))
    for prompts in (TOKENS[:5], TOKENS[:7], UNEVEN, TOKENS[:5]):
        model.generate(prompts, max_tokens=9)
        cupy.recorded = None
    assert [all(each() is None for each in cache) for cache in made] == [True, True, True, False]
    # The last is of the kind of the first, which has agreed: it is captured, and no step is taken without a graph.
    first = MISTRUSTED + COMPARE + 6 * REPLAY
    assert cupy.log == first + 8 * REPLAY + first + CAPTURE + 7 * REPLAY


PRIME = CONFIGS["prime"], np.ones(1, dtype=np.float32)
ONE_ROW = np.zeros(1, dtype=np.int32)


def filled(cache: KVCache, value: float = np.nan) -> KVCache:
    for x in arrays_of(cache):
        x[...] = value
    return cache


def test_what_a_cache_held_before_changes_nothing(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    cache = filled(backend.new_cache(*PRIME, 37, ONE_ROW))
    address = cache.layers[0][0].ctypes.data
    used = backend.new_cache(*PRIME, 37, ONE_ROW)
    assert used.layers[0][0].ctypes.data != address, "it is in use"
    filled(used)
    address = used.layers[0][0].ctypes.data
    del cache
    del used
    again = backend.new_cache(*PRIME, 11, ONE_ROW)
    assert again.layers[0][0].ctypes.data == address
    assert all((x == 0).all() for x in arrays_of(again))
    filled(again, 3)
    again = backend.grow_cache(again, 23)
    for x in arrays_of(again):
        assert x.shape[2] == 23
        assert (x[:, :, :11] == 3).all()
        assert (x[:, :, 11:] == 0).all()


def test_a_longer_cache_is_made_when_the_kept_one_is_gone(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, original, alive = CuPyBackend(), kv_cache.new_cache, []
    kept = [weakref.ref(x.base) for x in arrays_of(backend.new_cache(*PRIME, 11, ONE_ROW))]

    def new_cache(*args: Any) -> KVCache:
        alive.append(sum(each() is not None for each in kept))
        return original(*args)

    monkeypatch.setattr(kv_cache, "new_cache", new_cache)
    backend.new_cache(*PRIME, 7, ONE_ROW)
    assert alive == [], "it fits"
    backend.new_cache(*PRIME, 23, ONE_ROW)
    assert alive == [0]


def test_a_cache_that_grows_is_never_there_twice(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    xp = namespace()
    monkeypatch.setattr(adapter, "_namespace", lambda cupy: xp)
    backend = CuPyBackend()
    cache = filled(backend.new_cache(*PRIME, 11, ONE_ROW), 3)
    old, alive, concat = [weakref.ref(x.base) for x in arrays_of(cache)], [], xp.concat

    def watched(arrays: Any, axis: int) -> Any:
        alive.append(sum(each() is not None for each in old))
        return concat(arrays, axis=axis)

    monkeypatch.setattr(xp, "concat", watched)
    cache = backend.grow_cache(cache, 23)
    assert alive == [4, 4, 2, 2], "each layer's arrays are freed when it has longer ones"
    assert not any(each() is not None for each in old)
    assert all((x[:, :, :11] == 3).all() and (x[:, :, 11:] == 0).all() for x in arrays_of(cache))
    # The arrays are kept for the next, and grow in place as far as they go.
    addresses = [x.ctypes.data for x in arrays_of(cache)]
    del cache
    cache = backend.grow_cache(backend.new_cache(*PRIME, 7, ONE_ROW), 23)
    assert [x.ctypes.data for x in arrays_of(cache)] == addresses
    assert len(alive) == 4


def test_a_cache_whose_arrays_are_not_the_kept_ones_grows_by_itself(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    first, second = (filled(backend.new_cache(*PRIME, 11, ONE_ROW), value) for value in (3, 5))
    fork = second.copy(backend.xp)
    for cache, value in ((first, 3), (fork, 5), (second, 5)):
        grown = backend.grow_cache(cache, 23)
        filled(backend.new_cache(*PRIME, 23, ONE_ROW))
        for x in arrays_of(grown):
            assert (x[:, :, :11] == value).all()
            assert (x[:, :, 11:] == 0).all()


def test_a_graph_gives_its_memory_back(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    for prompts in (TOKENS[:5], TOKENS[:7], UNEVEN):
        model.generate(prompts, max_tokens=9)
        cupy.recorded = None
    gc.collect()
    assert cupy.freed == 1, "the graph of one row went with its cache"
    backend = model.backend
    assert backend.peak_memory() == 1007, "there was one graph at a time, beside the pool of all"
    del model
    gc.collect()
    assert cupy.freed == cupy.log.count("begin") == 2


def test_another_device_is_waited_for_and_gets_its_memory_back(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend(device="cuda:1"))
    model.generate(TOKENS[:5], max_tokens=9)
    model.backend.synchronize(np.zeros(1))
    cupy.recorded = None
    del model
    gc.collect()
    assert (cupy.freed, cupy.waited, cupy.device) == (1, [1], 0)


class Full(np.ndarray):
    """The array of a cache that fits the device once."""

    def copy(self, order: Any = "C") -> Any:
        raise MemoryError("out of memory")


def with_arrays(cache: KVCache, kind: type[np.ndarray]) -> KVCache:
    return cache._replace(layers=[(k.view(kind), v.view(kind)) for k, v in cache.layers])


def test_where_a_copy_of_the_cache_does_not_fit_the_text_is_the_plain_one(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    full = backend.replace(new_cache=lambda *args: with_arrays(CuPyBackend.new_cache(backend, *args), Full))
    model = small(full)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, and slower: MemoryError: out of memory"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    assert cupy.log == 8 * STEP
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))


def test_generations_that_begin_at_once_have_a_cache_each(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, meeting = CuPyBackend(), threading.Barrier(2)

    class Slow(np.ndarray):
        def fill(self, value: Any) -> None:  # until the other thread has looked too
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.2)
            super().fill(value)

    original = kv_cache.new_cache
    monkeypatch.setattr(kv_cache, "new_cache", lambda *args: with_arrays(original(*args), Slow))
    backend.new_cache(*PRIME, 37, ONE_ROW)  # kept, and free
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: backend.new_cache(*PRIME, 37, ONE_ROW), range(2))
    pairs = zip(arrays_of(one), arrays_of(other), strict=True)
    assert not any(np.may_share_memory(*pair) for pair in pairs)


def test_speculation_goes_back_and_forth(cupy: FakeCuPy) -> None:
    options: dict[str, Any] = {"max_tokens": 25, "ignore_eos": True}
    actual = small(CuPyBackend()).generate([5, 6] * 4, speculate=True, **options)
    same(actual, small(make_backend("numpy")).generate([5, 6] * 4, **options))


def test_two_generations_in_turns_have_a_cache_and_a_graph_each(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    prompts = TOKENS[:5], TOKENS[9:12]
    streams = [model.stream(prompt, max_tokens=9) for prompt in prompts]
    pieces = [piece for pair in zip(*streams, strict=True) for piece in pair]
    assert cupy.log == 2 * MISTRUSTED + COMPARE + 13 * REPLAY, "one graph of the kind is compared"
    plain = small(make_backend("numpy"))
    same([each.result for each in pieces if each.result], [plain.generate(each, max_tokens=9) for each in prompts])


def test_arrays_are_the_callers_own(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    decoder, kept = small(backend)._decoder, []
    _, cache = decoder.prefill([TOKENS[:5]])
    tokens = [np.asarray([[token]], dtype=np.int32) for token in TOKENS[5:11]]
    for token in tokens:
        logits, cache = decoder._step(token, cache, 1)
        kept.append(logits)
    assert [token.item() for token in tokens] == TOKENS[5:11]
    assert cupy.log[-3:] == 3 * REPLAY
    # A fork of the cache has its own arrays, and no graph yet.
    kept.append(decoder.decode([TOKENS[11]], cache.copy(backend.xp))[0])
    assert cupy.log[-5:] == CAPTURE
    expected = small(make_backend("numpy")).logits(TOKENS[:12])[5:]
    np.testing.assert_allclose(np.concatenate(kept), expected, atol=20 * TOLERANCE["same", "float32"])
    assert cache.position == 11


def test_it_is_for_plain_weights_and_few_rows(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CuPyBackend()
    small(backend).generate([[1]] * 17, max_tokens=6)
    Model(quantize(small_params("prime"), "int8"), CONFIGS["prime"], backend=backend.quantized()).generate([1])
    assert set(cupy.log) == {"step"}
    monkeypatch.setenv("GPT_XP_CUPY_GRAPH", "0")
    off = CuPyBackend()
    small(off).generate([1], max_tokens=6)
    assert set(cupy.log) == {"step"}
    assert off.settings()["cuda_graph"] == "no (GPT_XP_CUPY_GRAPH=0)"
    assert (off.cache_slots(17, 1024), backend.cache_slots(17, 1024)) == (64, 128)


def fail() -> None:
    raise RuntimeError("no such thing\nand more")


@pytest.mark.parametrize("place", ["wait", "run", "begin", "capture", "end", "launch"])
def test_where_it_fails_the_text_is_the_plain_one_and_one_warning_says_so(cupy: FakeCuPy, place: str) -> None:
    cupy.break_at[place] = fail
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="slower: RuntimeError: no such thing .GPT_XP_CUPY_GRAPH=0") as warnings:
        out = [model.generate(prompt, max_tokens=9) for prompt in (TOKENS[:5], TOKENS[9:12])]
    assert len(warnings) == 1
    plain = small(make_backend("numpy"))
    same(out, [plain.generate(prompt, max_tokens=9) for prompt in (TOKENS[:5], TOKENS[9:12])])
    assert cupy.log[-12:] == 12 * STEP
    assert isinstance(warnings[0].message, RuntimeWarning)
    assert isinstance(warnings[0].message.__cause__, RuntimeError), "it says where, for who asks"
    # What has begun to capture is made to end it.
    assert cupy.log.count("end") == (place in ("begin", "capture", "end", "launch"))
    assert graph_setting(model) == "no (RuntimeError: no such thing)"


def spoil_logits(graph: FakeGraph) -> None:
    graph.arrays[0].array()[...] *= 1.001


def spoil_logits_by_nan(graph: FakeGraph) -> None:
    graph.arrays[0].array()[0, 3] = np.nan


def spoil_cache(graph: FakeGraph) -> None:
    spoil_logits(graph)
    for each in graph.arrays[1:]:
        each.array()[...] = np.nan


@pytest.mark.parametrize("spoil", [spoil_logits, spoil_logits_by_nan, spoil_cache])
def test_a_graph_that_computes_something_else_is_not_used(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[FakeGraph], None]
) -> None:
    original = FakeGraph.launch

    def launch(self: FakeGraph) -> None:
        original(self)
        spoil(self)

    monkeypatch.setattr(FakeGraph, "launch", launch)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="its logits differ by"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert cupy.log.count("launch") == 1
    assert graph_setting(model).startswith("no (its logits differ by")


@pytest.mark.parametrize("frozen", ["token", "position"])
def test_a_graph_that_holds_on_to_what_it_was_captured_with_is_not_used(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    def freeze(self: FakeCuPy, function: Any, params: Any, tokens: Any, state: Any, *more: Any) -> Any:
        tokens = tokens.copy() if frozen == "token" else tokens
        state = (state[0].copy() if frozen == "position" else state[0], *state[1:])
        return functools.partial(replayed, function, params, tokens, state, *more)

    monkeypatch.setattr(FakeCuPy, "record", freeze)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="its logits differ by"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))


def test_the_benchmark_compares_texts(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("cuda_graph")
    assert script.compare_texts("shakespeare") == "with a graph and without: 65 of 65 tokens are the same"
    assert "GPT_XP_CUPY_GRAPH" not in os.environ
    out = script.generate("shakespeare", "0")
    texts = iter([replace(out, token_ids=[*out.token_ids[:-1], 0]), out])
    with monkeypatch.context() as patch:
        patch.setattr(script, "generate", lambda model, setting: next(texts))
        with pytest.raises(SystemExit, match="64 of 65 tokens are the same, and the next was chosen by a margin of"):
            script.compare_texts("shakespeare")
    cupy.break_at["begin"] = fail
    with pytest.warns(RuntimeWarning), pytest.raises(SystemExit, match="GPT_XP_CUPY_GRAPH=1: cuda_graph is 'no"):
        script.compare_texts("shakespeare")


# d_head is 16, and the number of columns is no multiple of 32.
ALIGNED = replace(CONFIGS["124M-ratios"], n_embd=48, n_head=3, n_layer=2)


def aligned(backend: Backend) -> Model:
    random = np.random.RandomState(3)

    def weight(*shape: int) -> Any:
        return random.standard_normal(shape) * 0.2

    n, norm = ALIGNED.n_embd, {"g": weight(48), "b": weight(48)}
    sizes = {"attn": {"c_attn": (n, 3 * n), "c_proj": (n, n)}, "mlp": {"c_fc": (n, 4 * n), "c_proj": (4 * n, n)}}
    blocks = [
        {"ln_1": norm, "ln_2": norm}
        | {part: {name: {"w": weight(*size), "b": weight(size[1])} for name, size in each.items()}
           for part, each in sizes.items()}
        for _ in range(ALIGNED.n_layer)
    ]  # fmt: skip
    params = {"wte": weight(211, n), "wpe": weight(64, n), "blocks": blocks, "ln_f": norm}
    return Model(params, ALIGNED, backend=backend)


PREPARED = {
    "split": {"split_product", "table_product", "thin_product", "fused"},  # thin ones: keys and values
    "append": {"thin_product", "fused"},
    "attention": {"thin_product", "fused", "attend"},
    "greedy": {"thin_product", "fused", "likeliest_of_parts", "likeliest"},
    "all": {"split_product", "table_product", "fused", "attend", "likeliest_of_parts", "likeliest"},
    "split, attention": {"split_product", "table_product", "fused", "attend"},
}


@pytest.mark.parametrize("kernels", PREPARED)
def test_what_is_prepared_gives_the_same_text(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    expected = aligned(make_backend("numpy")).generate(UNEVEN, max_tokens=None, ignore_eos=True)
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", kernels)
    cupy.log.clear()
    model = aligned(CuPyBackend())
    actual = model.generate(UNEVEN, max_tokens=None, ignore_eos=True)
    assert set(cupy.log[-30:]) == {"launch"}
    assert graph_setting(model) == "yes"
    same(actual, expected)
    assert set(cupy.RawKernel.launched) == PREPARED[kernels]
    names = list(adapter.KERNELS) if kernels == "all" else kernels.split(", ")
    assert model.backend.settings()["kernels"] == ", ".join(names)
    # Sampled, and with a penalty: nothing of `greedy` takes part.
    for options in ({"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}):
        cupy.RawKernel.launched.clear()
        actual = model.generate(TOKENS[:5], max_tokens=9, **options)
        assert not {"likeliest", "likeliest_of_parts"} & set(cupy.RawKernel.launched)
        same(actual, aligned(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9, **options))


def test_ids_without_a_token_are_not_chosen_by_the_kernel(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", "greedy")
    found = []
    for backend in (CuPyBackend(), make_backend("numpy")):
        model = aligned(backend)
        chooser = model._generator.chooser
        chooser.allowed = chooser._allowed_ids(SizedTokenizer(range(1, 200, 2)))
        found.append(model.generate(TOKENS[:5], max_tokens=20, ignore_eos=True))
    same(*found)
    assert all(token % 2 for token in found[0].token_ids)


class SizedTokenizer:
    """A tokenizer without text, that has some of the ids alone."""

    eos_token_id = None

    def __init__(self, ids: range) -> None:
        self.ids, self.n_vocab = ids, max(ids) + 1

    def __len__(self) -> int:
        return len(self.ids)

    def token_bytes(self, token: int) -> bytes:
        return b""


def test_kernels_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", "split,atention")
    with pytest.raises(BackendError, match="no kernels called 'atention': take some of split, append, attention"):
        CuPyBackend()


def test_a_prompt_is_computed_in_pieces_of_1024_tokens(cupy: FakeCuPy) -> None:
    chunk = CuPyBackend().chunk_tokens
    assert [chunk(batch) for batch in (1, 4, 8, 16, 32, 100)] == [1024, 1024, 512, 256, 128, 128]
    model, calls = small(CuPyBackend(), "long"), []
    step = model._decoder._step
    model._decoder._step = lambda tokens, *rest: calls.append(tokens.shape[1]) or step(tokens, *rest)  # type: ignore[method-assign]
    tokens = small_tokens("long")[0, :300].tolist()
    model.generate(tokens, max_tokens=2)
    assert calls == [300, 1]
    assert [piece.shape[1] for piece in model._decoder.prompt_logits([tokens])] == [300]


def check_texts_and_replays(monkeypatch: pytest.MonkeyPatch, create: Callable[[], Backend], dtype: str) -> None:
    """With a graph and without: one text. The graph was compared once for each kind of step, and then used."""
    replays: list[int] = []
    original = BoundStep.replay
    monkeypatch.setattr(BoundStep, "replay", lambda *args: replays.append(1) or original(*args))
    model = small(create(), "124M-ratios")
    monkeypatch.setenv("GPT_XP_CUPY_GRAPH", "0")
    plain = small(create(), "124M-ratios")
    # Of 39 steps after the first token, that of the capture is none; the last batch is of the kind of the first.
    for prompts, expected_replays in ((UNEVEN, 38), ([[5, 6, 7]], 38), ([[8, 9]], 39), (UNEVEN[::-1], 38)):
        before = len(replays)
        actual = model.generate(prompts, max_tokens=40, ignore_eos=True)
        assert len(replays) - before == expected_replays
        expected = plain.generate(prompts, max_tokens=40, ignore_eos=True)
        for ours, theirs in zip(actual, expected, strict=True):
            close = [margin < 1e-1 for margin in theirs.margins] + [True]
            n = close.index(True) if dtype == "float16" else len(close)  # up to a tie, within its rounding
            assert ours.token_ids[:n] == theirs.token_ids[:n]
    assert graph_setting(model) == "yes"


def test_the_text_is_the_one_without_a_graph(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    check_texts_and_replays(monkeypatch, CuPyBackend, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_on_a_gpu_the_text_is_the_one_without_a_graph(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    check_texts_and_replays(monkeypatch, functools.partial(make_backend, "cupy", dtype), dtype)
