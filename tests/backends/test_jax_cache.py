"""The cache of JAX on CPUs: what `KVCache` does, in another layout, and it grows."""

from typing import Any

import numpy as np
import pytest
from cached import CONFIG, TOKENS, forward, run, setup
from comparison import assert_values
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import KVCache, Model
from gpt_xp.generation import decoder as generation
from gpt_xp.tolerances import TOLERANCE


def layered(n_slots: int = 37, start: tuple[int, ...] = (0, 0, 0)) -> tuple[Any, Any, Any]:
    backend = make_backend("jax:cpu")
    params, _ = setup(backend)
    first = backend.asarray(np.array(start, dtype=np.int32))
    return backend, params, backend.new_cache(CONFIG, params["wte"], n_slots, first, backend.xp)


def full(backend: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    return backend.to_numpy(forward(backend)(params, backend.asarray(tokens), CONFIG))


@pytest.mark.parametrize("exact", [True, False], ids=["exact window", "all slots"])
def test_pieces_are_the_full_forward_pass(exact: bool) -> None:
    backend, params, cache = layered()
    assert isinstance(cache, KVCache)
    pieces, after = run(backend, params, cache, TOKENS, [7, 8, 9, 20, 31], exact)
    assert_values(pieces, full(backend, params, TOKENS), TOLERANCE["same", "float32"])
    assert type(after) is type(cache)
    assert int(after.position) == 31
    assert after.n_slots == 37
    assert [each.shape for each in (*after.k, *after.v)] == [(3 * 3, 37, 13)] * 4


def test_a_short_row_goes_on_around_the_ring() -> None:
    backend, params, cache = layered(start=(0, 24, 0))
    more = np.concatenate([TOKENS, TOKENS[:, :23]], axis=1)
    logits, _ = run(backend, params, cache, more, [31, *range(32, 55)])
    assert_values(logits[1, 24:], full(backend, params, more[1, 24:]), TOLERANCE["same", "float32"])


def growing(grown: Any = None) -> None:
    """Rows that begin at different slots, in a cache of 7, then 17, then 31 slots."""
    starts = (0, 5, 3)
    backend, params, cache = layered(7, starts)
    found = []
    for begin, end in ((0, 7), (7, 17), (17, 31)):
        if end > 7:
            cache = (grown or backend.grown)(cache, end)
        assert cache.n_slots == end
        logits, cache = forward(backend)(params, backend.asarray(TOKENS[:, begin:end]), CONFIG, cache=cache, window=end)
        found.append(backend.to_numpy(logits))
    logits = np.concatenate(found, axis=1)
    for row, start in enumerate(starts):
        assert_values(logits[row, start:], full(backend, params, TOKENS[row, start:]), TOLERANCE["same", "float32"])


def test_it_grows() -> None:
    growing()


@pytest.mark.parametrize("bug", ["forgets", "moves", "other heads"])
def test_a_planted_bug_of_growing_is_found(bug: str) -> None:
    backend = layered()[0]

    def wrong(cache: Any, n_slots: int) -> Any:
        xp = backend.xp
        if bug == "forgets":
            cache = cache._replace(k=tuple(each * 0 for each in cache.k))
        if bug == "other heads":
            cache = cache._replace(v=tuple(xp.roll(each, 1, axis=0) for each in cache.v))
        after = backend.grown(cache, n_slots)
        return after._replace(k=tuple(xp.roll(each, 1, axis=1) for each in after.k)) if bug == "moves" else after

    with pytest.raises(AssertionError):
        growing(wrong)


@pytest.mark.parametrize("public", [False, True])
def test_a_copy_is_another_cache(public: bool) -> None:
    backend, params, cache = layered()
    if public:
        params, cache = setup(backend)
    _, cache = run(backend, params, cache, TOKENS, [11])
    fork = cache.copy()
    step = backend.compile(gpt_xp.gpt2, static=("config", "window"), donate=("cache",))
    step(params, backend.asarray(TOKENS[:, 17:22]), CONFIG, cache=cache)  # what it held may be overwritten
    logits, _ = forward(backend)(params, backend.asarray(TOKENS[:, 11:16]), CONFIG, cache=fork)
    assert_values(backend.to_numpy(logits), full(backend, params, TOKENS[:, :16])[:, 11:], TOLERANCE["same", "float32"])


@pytest.mark.parametrize("speculate", [False, True])
def test_a_generation_is_that_of_numpy_while_it_grows(speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[int] = []
    original = generation.Engine._fitting

    def spy(engine: Any, cache: Any, used: int) -> Any:
        after, window = original(engine, cache, used)
        slots.append(after.n_slots)
        assert not engine.backend.grown or window == after.n_slots, "a part is looked at, and copied"
        return after, window

    monkeypatch.setattr(generation.Engine, "_fitting", spy)
    config, params = CONFIGS["long"], small_params("long")
    prompt = small_tokens("long")[0, :17].tolist()
    found = []
    for name in ("numpy", "jax:cpu"):
        backend = make_backend(name)
        slots.clear()
        model = Model(params, config, backend=backend)
        found.append(model.generate(prompt, max_tokens=None, ignore_eos=True, speculate=speculate))
    assert sorted({*slots}) == [128, 256, 384], "the buckets of its windows, up to the context"
    assert slots == sorted(slots)
    assert found[0].token_ids == found[1].token_ids
    assert len(found[0].token_ids) == config.n_ctx - 17 + 1
