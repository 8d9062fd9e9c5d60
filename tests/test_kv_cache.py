"""The key/value cache: however the tokens are cut into chunks, the logits are those of the full forward pass."""

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
from cached import CONFIG, PARAMS, TOKENS, forward, forward_with_cache, run, setup
from comparison import TOLERANCE, assert_close, assert_values, xp_of
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Backend, Model
from gpt_xp.errors import ConfigError, PromptError
from gpt_xp.generation.decoder import Decoder
from gpt_xp.generation.step_functions import next_token_logits


@pytest.mark.parametrize("grow", [False, True], ids=["all slots", "growing"])
def test_pieces_are_the_full_forward_pass(backend: Backend, grow: bool) -> None:
    params, cache = setup(backend, n_slots=5 if grow else 37)
    full = backend.to_numpy(forward(backend)(params, backend.asarray(TOKENS), CONFIG))
    chunked, after = run(backend, params, cache, TOKENS, [7, 8, 9, 20, 31], grow)
    assert_values(chunked, full, TOLERANCE["same", "float32"])
    assert int(after.position) == 31
    assert [k.shape for k, _ in after.layers] == [(9, 31 if grow else 37, 13)] * 2
    assert [v.shape for _, v in after.layers] == [k.shape for k, _ in after.layers]


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(1, 30), max_size=30).map(lambda cuts: [*sorted(cuts), 31]), st.booleans())
def test_any_pieces_are_the_full_forward_pass(cuts: list[int], grow: bool) -> None:
    backend = make_backend("numpy")
    params, cache = setup(backend, n_slots=1 if grow else 37)
    full = forward(backend)(params, TOKENS, CONFIG)
    assert_values(run(backend, params, cache, TOKENS, cuts, grow)[0], full, TOLERANCE["same", "float32"])


def test_rows_padded_on_the_left_are_rows_alone(backend: Backend) -> None:
    starts = (0, 5, 11)
    params, cache = setup(backend, start=starts)
    padded = TOKENS.copy()
    for row, start in zip(padded, starts, strict=True):
        row[:start] = 0
    logits, _ = run(backend, params, cache, padded, [3, 12, 13, 14, 31])
    for row, start in enumerate(starts):
        alone = forward(backend)(params, backend.asarray(TOKENS[row, start:]), CONFIG)
        assert_values(logits[row, start:], backend.to_numpy(alone), TOLERANCE["same", "float32"])


def test_a_short_row_goes_on_around_the_ring(backend: Backend) -> None:
    # 37 slots for 31 + 23 tokens: row 0 is a long prompt that has ended, row 1 began at slot 24 and goes on.
    params, cache = setup(backend, start=(0, 24, 0))
    more = np.concatenate([TOKENS, TOKENS[:, :23]], axis=1)
    logits, after = run(backend, params, cache, more, [31, *range(32, 55)])
    alone = forward(backend)(params, backend.asarray(more[1, 24:]), CONFIG)
    assert_values(logits[1, 24:], backend.to_numpy(alone), TOLERANCE["same", "float32"])
    assert np.isfinite(logits).all()
    assert int(after.position) == 54


def test_padding_behind_a_piece_is_overwritten(backend: Backend) -> None:
    params, cache = setup(backend)
    junk = np.concatenate([TOKENS[:, :7], np.full((3, 9), 5, dtype=np.int32)], axis=1)
    _, cache = forward_with_cache(backend)(params, backend.asarray(junk), CONFIG, cache=cache)
    cache = cache._replace(position=7)
    logits, _ = forward_with_cache(backend)(params, backend.asarray(TOKENS[:, 7:9]), CONFIG, cache=cache)
    full = forward(backend)(params, backend.asarray(TOKENS[:, :9]), CONFIG)
    assert_close(logits, backend.to_numpy(full)[:, 7:], backend, "same")


def test_a_copy_is_another_cache(backend: Backend) -> None:
    params, cache = setup(backend)
    _, cache = run(backend, params, cache, TOKENS, [11])
    fork = cache.copy()
    run_on = {}
    for name, branch, begin in (("left", cache, 11), ("right", fork, 17)):  # the right one sees other tokens
        tokens = backend.asarray(TOKENS[:, begin : begin + 5])
        run_on[name], _ = forward_with_cache(backend)(params, tokens, CONFIG, cache=branch)
    for name, begin in (("left", 11), ("right", 17)):
        whole = np.concatenate([TOKENS[:, :11], TOKENS[:, begin : begin + 5]], axis=1)
        full = forward(backend)(params, backend.asarray(whole), CONFIG)
        assert_close(run_on[name], backend.to_numpy(full)[:, 11:], backend, "same")


@pytest.mark.parametrize("start", [np.array([0.0, 5.0, 11.0]), np.array([0, 5, 11]), [0, 5, 11]], ids=str)
def test_start_may_come_from_anywhere(backend: Backend, start: Any) -> None:
    params, cache = setup(backend, start=(0, 5, 11))
    expected, _ = run(backend, params, cache, TOKENS, [31])
    fresh = gpt_xp.new_cache(CONFIG, params["wte"], 37, start, xp_of(backend))
    assert fresh.start.dtype == backend.xp.int32
    assert_values(run(backend, params, fresh, TOKENS, [31])[0], expected, TOLERANCE["same", "float32"])


def test_a_start_of_another_shape_or_another_config_is_refused(backend: Backend) -> None:
    like = setup(backend)[0]["wte"]
    with pytest.raises(PromptError, match=r"start must have one whole number for each row, \[batch\]"):
        gpt_xp.new_cache(CONFIG, like, 37, 0, xp_of(backend))
    with pytest.raises(ConfigError, match="config must be"):
        gpt_xp.new_cache(dataclasses.asdict(CONFIG), like, 37, [0], xp_of(backend))
    with pytest.raises(ConfigError, match=r"like must be an array of the model, such as params\['wpe'\], not dict"):
        gpt_xp.new_cache(CONFIG, {"wpe": like}, 37, [0])


@pytest.mark.parametrize("start", [[-1], [0.7], np.array([0, -3]), ["a"], "a", None, [float("nan")], [[0]]], ids=str)
def test_a_start_that_is_no_slot_is_refused(start: Any) -> None:
    with pytest.raises(
        PromptError, match=r"start must have one whole number for each row, \[batch\], of at least 0, not"
    ):
        gpt_xp.new_cache(CONFIG, PARAMS["wpe"], 37, start)


@pytest.mark.parametrize("n_slots", [0, -1, "a", 3.5, None])
def test_a_cache_without_slots_is_refused(n_slots: Any) -> None:
    with pytest.raises(ConfigError, match="n_slots must be a whole number of at least 1, not"):
        gpt_xp.new_cache(CONFIG, PARAMS["wpe"], n_slots, [0])


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_tokens_that_do_not_fit_the_cache_are_refused(backend: Backend, shape: tuple[int, ...]) -> None:
    params, cache = setup(backend)
    tokens = backend.asarray(np.zeros(shape, dtype=np.int32))
    with pytest.raises(PromptError, match=r"with this cache it must be \[batch, n_seq\] of 3 rows"):
        gpt_xp.gpt2_with_cache(params, tokens, CONFIG, cache, xp_of(backend))


def test_too_many_tokens_for_the_slots(backend: Backend) -> None:
    params, cache = setup(backend, n_slots=19)
    xp = xp_of(backend)
    with pytest.raises(PromptError, match="20 tokens were given, and the cache has room for 19"):
        gpt_xp.gpt2_with_cache(params, backend.asarray(TOKENS[:, :20]), CONFIG, cache=cache, xp=xp)
    _, cache = gpt_xp.gpt2_with_cache(params, backend.asarray(TOKENS[:, :17]), CONFIG, cache=cache, xp=xp)
    with pytest.raises(PromptError, match="3 tokens were given, and the cache has room for 2"):
        gpt_xp.gpt2_with_cache(params, backend.asarray(TOKENS[:, :3]), CONFIG, cache=cache, xp=xp)


def growing(backend: Backend, grow: Any) -> None:
    """Rows that begin at different slots, in a cache of 7, then 17, then 31 slots."""
    starts = (0, 5, 3)
    params, cache = setup(backend, n_slots=7, start=starts)
    found = []
    for begin, end in ((0, 7), (7, 17), (17, 31)):
        if end > 7:
            cache = grow(cache, end)
        assert cache.n_slots == end
        tokens = backend.asarray(TOKENS[:, begin:end])
        logits, cache = forward_with_cache(backend)(params, tokens, CONFIG, cache=cache)
        found.append(backend.to_numpy(logits))
    logits = np.concatenate(found, axis=1)
    for row, start in enumerate(starts):
        alone = forward(backend)(params, backend.asarray(TOKENS[row, start:]), CONFIG)
        assert_values(logits[row, start:], backend.to_numpy(alone), TOLERANCE["same", "float32"])


def test_rows_that_begin_at_different_slots_in_a_cache_that_grows(backend: Backend) -> None:
    growing(backend, backend.grow_cache)


@pytest.mark.parametrize("bug", ["forgets", "moves", "other heads"])
def test_a_planted_bug_of_growing_is_found(bug: str) -> None:
    backend = make_backend("numpy")

    def wrong(cache: Any, n_slots: int) -> Any:
        after = backend.grow_cache(cache, n_slots)
        if bug == "forgets":
            layers = [(k * 0, v) for k, v in after.layers]
        elif bug == "moves":
            layers = [(np.roll(k, 1, axis=1), v) for k, v in after.layers]
        else:
            layers = [(k, np.roll(v, 1, axis=0)) for k, v in after.layers]
        return after._replace(layers=layers)

    with pytest.raises(AssertionError):
        growing(backend, wrong)


def test_growing_never_holds_two_caches() -> None:
    config, like = CONFIGS["124M-ratios"], np.zeros(1, np.float32)
    cache = gpt_xp.new_cache(config, like, 1024, [0] * 8)
    size = sum(k.nbytes + v.nbytes for k, v in cache.layers)
    tracemalloc.start()
    try:
        cache = make_backend("numpy").grow_cache(cache, 1088)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The layers that have grown are counted, with a quarter of spare room. The older ones, made before, are not: two
    # more are there for a moment.
    assert peak < size * (1.25 * 1088 / 1024 + 3 / config.n_layer)
    assert [k.shape[1] for k, _ in cache.layers] == [1088] * config.n_layer


def test_numpy_copies_a_cache_that_grows_only_now_and_then() -> None:
    """Growing is a longer view of arrays with spare room, which no other cache sees."""
    backend = make_backend("numpy")
    cache = gpt_xp.new_cache(CONFIGS["124M-ratios"], np.zeros(1, np.float32), 64, [0])
    owners = set[int]()
    for n_slots in range(64, 1025, 64):
        cache = backend.grow_cache(cache, n_slots)
        written = [cache.layers[0][0], cache.layers[-1][1]]
        for x in written:
            assert x.shape[1] == n_slots
            assert (x[:, :-64] == n_slots - 64).all()
            assert (x[:, -64:] == (0 if n_slots > 64 else x[:, -64:])).all()
            x[:] = n_slots
        owners.add(id(written[0].base))
        fork = cache.copy()
        for x in (fork.layers[0][0], backend.grow_cache(fork, n_slots + 64).layers[0][0]):
            x[:] = -1
        assert (written[0] == n_slots).all()
    assert len(owners) < 9
    # The first rows of a larger array, and other slots than its first, are not taken for a cache with spare room.
    for part in (np.ones((7, 23, 13))[:5, :11], np.ones((7, 23, 13))[:, 5:11], np.ones((7, 23, 13))[:, :11, :9]):
        alone = gpt_xp.KVCache([(part, part.copy())], 6, np.zeros(1, np.int32))
        for x in backend.grow_cache(alone, 23).layers[0]:
            assert x.shape == (part.shape[0], 23, part.shape[2])
            assert (x[:, : part.shape[1]] == 1).all()
            assert not x[:, part.shape[1] :].any()


def test_a_copy_survives_a_compiled_step_that_may_reuse_the_cache() -> None:
    backend = make_backend("jax")
    params, cache = setup(backend)
    _, cache = run(backend, params, cache, TOKENS, [11])
    fork = cache.copy()
    step = backend.compile(gpt_xp.gpt2_with_cache, static=("config",), donate=("cache",))
    step(params, backend.asarray(TOKENS[:, 17:22]), CONFIG, cache=cache)  # what it held may be overwritten
    logits, _ = forward_with_cache(backend)(params, backend.asarray(TOKENS[:, 11:16]), CONFIG, cache=fork)
    full = backend.to_numpy(forward(backend)(params, backend.asarray(TOKENS[:, :16]), CONFIG))
    assert_values(backend.to_numpy(logits), full[:, 11:], TOLERANCE["same", "float32"])


def test_a_compiled_step_does_not_copy_the_cache() -> None:
    jax, config = pytest.importorskip("jax"), CONFIGS["124M-ratios"]
    backend = make_backend("jax:cpu")
    params = Model(small_params("124M-ratios"), config, backend=backend).params
    cache = backend.new_cache(config, params["wpe"], 1024, backend.asarray(np.zeros(1, dtype=np.int32)))
    jitted = jax.jit(next_token_logits, static_argnames=("config", "xp"), donate_argnames="cache")
    token = backend.asarray(np.asarray([[3]], dtype=np.int32))
    step = jitted.lower(params, token, cache, 1, config=config, xp=backend.xp).compile()
    assert step.memory_analysis().temp_size_in_bytes < cache.layers[0][0].nbytes


@pytest.mark.parametrize("speculate", [False, True])
def test_a_generation_is_that_of_numpy_while_its_cache_grows(speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[int] = []
    original = Decoder.grow_cache

    def spy(decoder: Any, cache: Any, n_tokens: int) -> Any:
        after = original(decoder, cache, n_tokens)
        slots.append(after.n_slots)
        return after

    monkeypatch.setattr(Decoder, "grow_cache", spy)
    config, params = CONFIGS["long"], small_params("long")
    prompt = small_tokens("long")[0, :17].tolist()
    found = []
    for name, sizes in (("numpy", [*range(32, 307, 16), 307]), ("jax:cpu", [128, 256, 384])):
        slots.clear()
        model = Model(params, config, backend=make_backend(name))
        found.append(model.generate(prompt, max_tokens=None, ignore_eos=True, speculate=speculate))
        assert sorted({*slots}) == sizes, "what each backend takes, up to the context"
        assert slots == sorted(slots)
    assert found[0].token_ids == found[1].token_ids
    assert len(found[0].token_ids) == config.n_ctx - 17 + 1
