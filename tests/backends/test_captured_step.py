"""Which arrays a recorded step is for, and when it is dropped. A runner without a library notes its calls."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from gpt_xp_backends.captured_step import CapturedStep, GraphGuard
from gpt_xp_backends.numpy_backend import namespace

from gpt_xp.kv_cache import KVCache

XP = namespace()
PARAMS = {"wte": np.ones(3)}


class Replay:
    output = np.zeros((2, 5))

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def run(self) -> None:
        self.log.append("replay")


class Runner:
    """`log` says what was done, and `made` has weak references to the recordings."""

    xp = tracer = XP
    max_rows = 3

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made: list[weakref.ref[Replay]] = []

    def record(self, step: Any) -> tuple[Any, Replay]:
        self.log.append("record")
        replay = Replay(self.log)
        self.made.append(weakref.ref(replay))
        return step(), replay

    def address(self, x: np.ndarray) -> int:
        return x.ctypes.data

    def wait(self) -> None:
        pass


class Everything(set[Any]):
    """All kinds are trusted."""

    def __contains__(self, kind: object) -> bool:
        return True


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def step(runner: Runner) -> Any:
    def function(params: Any, tokens: Any, cache: KVCache, count: int, *, config: str, xp: Any) -> Any:
        runner.log.append("step")
        return np.zeros((len(tokens), 5)), cache._replace(position=cache.position + count)

    guard = GraphGuard(None, "steps are slower", "SWITCH=0")
    guard.agreed = Everything()
    captured = CapturedStep(function, runner, guard)

    def call(cache: KVCache, params: Any = PARAMS, n_rows: int = 2, n_seq: int = 1, **options: Any) -> list[str]:
        runner.log.clear()
        captured(params, np.ones((n_rows, n_seq), np.int32), cache, 1, **{"config": "a", "xp": XP, **options})
        return [*runner.log]

    return call


def cache_of(*buffers: np.ndarray, position: int = 7) -> KVCache:
    return KVCache(list(zip(buffers[::2], buffers[1::2], strict=True)), position, np.zeros(2, np.int32))


def buffers(n_slots: int = 11) -> list[np.ndarray]:
    return [np.zeros((2, 3, n_slots, 5), np.float32) for _ in range(4)]


RECORD, REPLAY, STEP = ["record", "step"], ["replay"], ["step"]


def test_a_recording_is_for_its_own_arrays(step: Any) -> None:
    arrays = buffers()
    assert step(cache_of(*arrays)) == RECORD
    assert step(cache_of(*(x[...] for x in arrays), position=8)) == REPLAY, (
        "the same memory, another start and position"
    )
    for place in range(4):
        others = [x.copy() if each == place else x for each, x in enumerate(arrays)]
        assert step(cache_of(*others)) == RECORD, place
    assert step(cache_of(*(x[:, :, :7] for x in arrays))) == RECORD, "of another shape"
    transposed = [x.reshape(2, 11, 3, 5).transpose(0, 2, 1, 3) for x in arrays]
    assert step(cache_of(*transposed)) == RECORD, "of other strides"
    assert step(cache_of(*arrays), params=dict(PARAMS)) == RECORD
    assert step(cache_of(*arrays), config="b") == RECORD
    assert step(cache_of(*arrays), n_rows=1) == RECORD
    assert step(cache_of(*arrays)) == REPLAY


def test_steps_that_are_not_recorded(step: Any) -> None:
    cache = cache_of(*buffers())
    assert step(cache, n_seq=2) == STEP, "prefill"
    assert step(cache, n_rows=4) == STEP, "too many rows"
    assert step(cache, xp=np) == STEP, "another namespace"
    assert step(cache._replace(position=np.asarray(7))) == STEP, "a step inside a step"


def test_a_recording_keeps_no_cache_alive_and_is_dropped_after_it(step: Any, runner: Runner) -> None:
    arrays = buffers()
    whole = weakref.ref(arrays[3])
    step(cache_of(*(x[:, :, :7] for x in arrays)))
    del arrays[3]
    gc.collect()
    assert whole() is None
    step(cache_of(*buffers()))
    gc.collect()
    assert [made() is None for made in runner.made] == [True, False]


def test_new_arrays_at_the_place_of_old_ones_are_others(
    step: Any, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "address", lambda x: 4096)
    arrays = buffers()
    assert step(cache_of(*arrays)) == RECORD
    del arrays
    gc.collect()
    assert step(cache_of(*buffers())) == RECORD
