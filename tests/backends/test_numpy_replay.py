"""Decode steps of NumPy that are recorded and played: the bits of the same steps by `model.py`."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from comparison import assert_values
from gpt_xp_backends import numpy_backend, numpy_replay
from hypothesis import given
from hypothesis import strategies as st
from libraries import quantized
from small_models import CONFIGS, small_params, tree_map
from small_quantized import KINDS, small

from gpt_xp import Model
from gpt_xp.errors import PromptError
from gpt_xp.generation import decoder as generation
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6], [5, 3, 5, 8], [9, 7, 9]]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is recorded anew after every fourth token."""
    monkeypatch.setattr(numpy_backend, "SLOTS", 4)


def make(kind: str | None = None, dtype: str = "float32") -> Model:
    """A small model, of quantized weights or of that dtype."""
    backend = get_backend("numpy", dtype=dtype)
    if kind:
        params, config = small(kind)
        return Model(params, config, backend=quantized(backend))
    params = tree_map(lambda leaf: leaf.astype(dtype), small_params("prime"))
    return Model(params, CONFIGS["prime"], backend=backend)


def logits_of(model: Model, rows: int, n_new: int) -> "np.ndarray[Any, Any]":
    """The logits of each step of a generation that always takes the likeliest token, [n_new, rows, n_vocab]."""
    engine, steps = model._engine, []
    logits, cache, used = engine.prefill(PROMPTS[:rows], n_new)
    for _ in range(n_new):
        logits, cache, used = engine.decode(logits.argmax(axis=-1), cache, used)
        steps.append(logits)
    return np.stack(steps)


def unplayed(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    """What `function` returns where every step is computed by `model.py`."""
    with monkeypatch.context() as patch:
        patch.setattr(numpy_replay.Recorder, "is_for", lambda *_: False)
        return function()


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, "float32"), (None, "float64"), *((kind, "float32") for kind in KINDS)]
)
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch, kind: str | None, dtype: str, rows: int) -> None:
    model = make(kind, dtype)
    expected = unplayed(monkeypatch, lambda: logits_of(model, rows, 11))
    np.testing.assert_array_equal(logits_of(model, rows, 11), expected)
    assert len({each.tobytes() for each in expected}) == 11  # each step has logits of its own


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 29, 32, 33])
def test_products_of_several_rows(monkeypatch: pytest.MonkeyPatch, rows: int, transposed: bool) -> None:
    monkeypatch.setattr(numpy_backend, "PART", 5)
    multiplied: list[int] = []
    original = np.matmul

    def spy(x: Any, w: Any, *out: Any) -> Any:
        multiplied.append(w.shape[-1])
        return original(x, w, *out)

    monkeypatch.setattr(np, "matmul", spy)
    random = np.random.RandomState(rows)
    x = random.standard_normal((rows, 7)).astype(np.float32)
    w = random.standard_normal((13, 7)).astype(np.float32).T
    w = w if transposed else np.ascontiguousarray(w)
    product = numpy_backend.namespace().matmul(x, w)
    expected = np.einsum("ij,jk->ik", x.astype(np.float64), w.astype(np.float64))
    assert_values(product, expected, TOLERANCE["same", "float32"])
    assert multiplied == ([5, 5, 3] if transposed and 3 < rows < 33 else [13])


def test_most_steps_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int] = []
    original = generation.last_logits

    def spy(params: Any, tokens: Any, cache: Any, count: Any, config: Any, window: int, xp: Any) -> Any:
        windows.append(window)
        return original(params, tokens, cache, count, config, window, xp)

    monkeypatch.setattr(generation, "last_logits", spy)
    logits_of(make(), rows=1, n_new=11)  # 5 tokens of prompt, and then 6 to 16 are used
    assert windows == [8, 8, 8, 12, 16]  # the prompt, the first step, and three that are recorded


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_several_tokens_of_each_row(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    """As they are checked in speculation; where they do not fit, the error is that of the cache."""
    model = make(kind)

    def passes() -> Any:
        engine, found = model._engine, []
        _, cache, used = engine.prefill(PROMPTS[:2], 17)
        for token in range(0, 15, 3):
            cache, window = engine._fitting(cache, used + 3)
            tokens = np.asarray([[token, 5, 6], [7, token, 9]], np.int32)
            each, cache = engine._each_logits(
                model.params, tokens, cache, config=model.config, window=window, xp=model.backend.xp
            )
            used += 3
            assert cache.position == used
            found += each
        with pytest.raises(PromptError, match="3 tokens were given, and the cache has room for 2"):
            engine._each_logits(model.params, tokens, cache, config=model.config, window=window, xp=model.backend.xp)
        return np.stack(found)

    found = passes()
    assert found.shape[:2] == (15, 2)
    np.testing.assert_array_equal(found, unplayed(monkeypatch, passes))


def test_the_ring_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()

    def beyond() -> Any:
        engine, steps = model._engine, []
        _, cache, used = engine.prefill(PROMPTS[:2], 3)
        for token in range(25):
            logits, cache, used = engine.decode([token, token], cache, used)
            steps.append(logits)
        assert cache.n_slots == 8
        return np.stack(steps)

    np.testing.assert_array_equal(beyond(), unplayed(monkeypatch, beyond))


@given(st.lists(st.sampled_from([0, 1, 2, "copy"]), min_size=8, max_size=24))
def test_caches_in_any_order(order: list[Any]) -> None:
    model = make()

    def run() -> Any:
        engine, steps = model._engine, []
        states = [engine.prefill(PROMPTS[n : n + 1 + n % 2], 24) for n in range(3)]
        for place, which in enumerate(order):
            if which == "copy":
                logits, cache, used = states[0]
                states[2] = logits, cache.copy(), used
                continue
            logits, cache, used = states[which]
            states[which] = engine.decode([place] * len(logits), cache, used)
            steps.append(states[which][0])
        return steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_backend, "SLOTS", 4)
        expected = unplayed(patch, run)
        for found, wanted in zip(run(), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_two_threads_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = unplayed(monkeypatch, lambda: logits_of(model, 2, 20))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(logits_of(model, 2, 20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_a_step_that_was_interrupted_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = unplayed(monkeypatch, lambda: logits_of(model, 1, 12))
    original = numpy_replay.Tape.add
    calls = iter(range(10**6))

    def interrupted(tape: Any, call: Any) -> None:
        original(tape, call)
        if next(calls) in (20, 150):
            raise KeyboardInterrupt

    monkeypatch.setattr(numpy_replay.Tape, "add", interrupted)
    engine, n_interrupted = model._engine, 0
    logits, cache, used = engine.prefill(PROMPTS[:1], 12)
    for wanted in expected:
        token = logits.argmax(axis=-1)
        try:
            logits, cache, used = engine.decode(token, cache, used)
        except KeyboardInterrupt:
            n_interrupted += 1
            logits, cache, used = engine.decode(token, cache, used)
        np.testing.assert_array_equal(logits, wanted)
    assert n_interrupted == 2


def test_memory_goes_with_its_owners() -> None:
    model = make()
    engine = model._engine
    _, cache, used = engine.prefill(PROMPTS[:1], 9)
    for _ in range(6):
        _, cache, used = engine.decode([1], cache, used)
    keys, weight = weakref.ref(cache.k), weakref.ref(model.params["wte"])
    gc.disable()
    try:
        del cache
        assert keys() is None, "a recording keeps the cache"
        del model, engine
        assert weight() is None, "what was recorded keeps the params until Python's collector comes by"
    finally:
        gc.enable()


def _used_again_at_once(memory: Any, array: Any, free: Any) -> None:
    memory.array, memory._free = array, []
    free.append(array)


@pytest.mark.parametrize(
    ("owner", "method", "bug"),
    [
        (numpy_replay.Recording, "put", lambda *_: None),
        (numpy_replay.Recording, "write", lambda *_: None),
        (numpy_replay.Memory, "__init__", _used_again_at_once),
    ],
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, bug: Any) -> None:
    model = make()
    expected = unplayed(monkeypatch, lambda: logits_of(model, 1, 11))
    monkeypatch.setattr(owner, method, bug)
    assert not np.array_equal(logits_of(model, 1, 11), expected)
