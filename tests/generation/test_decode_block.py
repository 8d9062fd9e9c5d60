"""Decoding in blocks on the device: the same text as the plain loop, whatever ends it, and few compiled programs.

JAX runs on its CPU as it does on accelerators. For other libraries, a loop replaces the block.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from libraries import in_blocks, make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Backend, Generation, GPT2Config, Model
from gpt_xp.generation import choosing, decoder, loop
from gpt_xp.tolerances import TOLERANCE

TOKENS = small_tokens("prime")[0].tolist()
UNEVEN = [TOKENS[:3], TOKENS[:29], TOKENS[:1], TOKENS[:11]]
FILTERS = {"temperature": 0.8, "top_k": 23, "top_p": 0.9, "min_p": 0.01, "seed": 5}
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 2},
    "filters, penalty": FILTERS | {"repetition_penalty": 1.2},
}


@pytest.fixture(autouse=True)
def blocks_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "BLOCK_STEPS", 5)


def plain(backend: Backend, **changes: Any) -> Backend:
    return backend.replace(decode_block=None, **changes)


def small(backend: Backend, name: str = "prime", **changes: Any) -> Model:
    return Model(small_params(name), replace(CONFIGS[name], **changes), backend=backend)


def same(actual: Generation, expected: Generation) -> None:
    """Check for equal tokens, logprobs, margins and ends. None of the texts here has a tie."""
    assert min(expected.margins, default=1) > 1e-4
    assert actual.token_ids == expected.token_ids
    assert (actual.text, actual.finish_reason) == (expected.text, expected.finish_reason)
    # Logits are around 10, and a logprob or margin is a difference of two.
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=20 * TOLERANCE["same", "float32"])
    np.testing.assert_allclose(actual.margins, expected.margins, atol=20 * TOLERANCE["same", "float32"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_give_the_text_of_the_plain_loop(backend: Backend, options: dict[str, Any]) -> None:
    # 30 tokens are one token, five blocks of 5 and part of a block. Two rows reach the context earlier, within a block.
    expected = small(plain(backend)).generate(UNEVEN, max_tokens=30, **options)
    actual = small(in_blocks(backend)).generate(UNEVEN, max_tokens=30, **options)
    assert [out.finish_reason for out in expected] == ["max_tokens", "context", "max_tokens", "context"]
    for ours, theirs in zip(actual, expected, strict=True):
        same(ours, theirs)


def test_the_ring_begins_again_amid_a_block(backend: Backend) -> None:
    prompts = [TOKENS[:16], TOKENS[20:23]]
    exact = {"cache_slots": lambda n, n_ctx: n_ctx}  # By default, the cache of JAX is longer than the context.
    expected = small(plain(backend)).generate(prompts, max_tokens=None)
    actual = small(in_blocks(backend, **exact)).generate(prompts, max_tokens=None)
    assert [len(out.token_ids) for out in expected] == [22, 35]  # 16 + 35 > 37 slots
    for ours, theirs in zip(actual, expected, strict=True):
        same(ours, theirs)


def test_the_end_token_ends_amid_a_block() -> None:
    backend, place = make_backend("jax"), 8  # in the second block
    free = small(plain(backend)).generate(UNEVEN, max_tokens=20, **FILTERS)
    text = free[0].token_ids
    assert text[place] not in text[:place]
    expected = small(plain(backend), eos_token_id=text[place]).generate(UNEVEN, max_tokens=20, **FILTERS)
    actual = small(in_blocks(backend), eos_token_id=text[place]).generate(UNEVEN, max_tokens=20, **FILTERS)
    assert (expected[0].finish_reason, len(expected[0].token_ids)) == ("eos", place)
    assert {out.finish_reason for out in expected} > {"eos"}  # others go on
    for ours, theirs in zip(actual, expected, strict=True):
        same(ours, theirs)


def test_a_stop_string_ends_amid_a_block_and_pieces_come_one_by_one() -> None:
    backend = make_backend("jax")
    ours, theirs = (gpt_xp.load("shakespeare", backend=each) for each in (in_blocks(backend), plain(backend)))
    free = theirs.generate("ROMEO:", max_tokens=22)
    stop = free.text[len(free.text) // 2 :][:6]
    streams = [list(model.stream("ROMEO:", max_tokens=22, stop=stop)) for model in (ours, theirs)]
    pieces = [[(piece.text, piece.token_id) for piece in stream] for stream in streams]
    assert pieces[0] == pieces[1]
    results = [stream[-1].result for stream in streams]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].finish_reason == "stop"
    same(results[0], results[1])


def test_few_programs_and_no_step_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    original = decoder.decode_steps

    def spy(params: Any, token: Any, cache: Any, **arguments: Any) -> Any:
        traced.append(cache.n_slots)
        return original(params, token, cache, **arguments)

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("a step of its own")

    monkeypatch.setattr(decoder, "decode_steps", spy)
    monkeypatch.setattr(decoder.Decoder, "decode", forbidden)
    prompt = small_tokens("long")[0, :17].tolist()
    model = small(in_blocks(make_backend("jax")), "long")
    out = model.generate(prompt, max_tokens=None, ignore_eos=True)
    assert len(out.token_ids) == 307 - 17 + 1
    assert traced == [128, 256, 384]
    model.generate(prompt[:5], max_tokens=200, ignore_eos=True)
    assert traced == [128, 256, 384], "compiled again after warm-up"
    monkeypatch.undo()
    same(out, small(plain(make_backend("jax")), "long").generate(prompt, max_tokens=None, ignore_eos=True))


def test_noise_is_drawn_for_the_tokens_that_may_come_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = choosing.gumbel_noise

    def spy(seed: int, sample: int, step: int, *rest: Any) -> Any:
        drawn.append(step)
        return original(seed, sample, step, *rest)

    monkeypatch.setattr(choosing, "gumbel_noise", spy)
    small(in_blocks(make_backend("numpy"))).generate(TOKENS[:3], max_tokens=18, ignore_eos=True, **FILTERS)
    assert drawn == list(range(18))


def test_speculation_takes_the_place_of_blocks() -> None:
    backend = make_backend("numpy")
    out = small(in_blocks(backend)).generate([5, 6] * 4, max_tokens=25, speculate=True, ignore_eos=True)
    same(out, small(plain(backend)).generate([5, 6] * 4, max_tokens=25, ignore_eos=True))


def test_numbers_that_are_not_finite_are_an_error_in_a_block() -> None:
    config = GPT2Config(n_vocab=31, n_ctx=41, n_embd=6, n_head=2, n_layer=1)
    rng = np.random.RandomState(1)

    def weight(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    norm = {"g": weight(6), "b": weight(6)}
    block = {
        "ln_1": norm,
        "attn": {"c_attn": {"w": weight(6, 18), "b": weight(18)}, "c_proj": {"w": weight(6, 6), "b": weight(6)}},
        "ln_2": norm,
        "mlp": {"c_fc": {"w": weight(6, 24), "b": weight(24)}, "c_proj": {"w": weight(24, 6), "b": weight(6)}},
    }
    params = {"wte": weight(31, 6), "wpe": weight(41, 6), "blocks": [block], "ln_f": norm}
    params["wpe"][9] = np.nan  # The second block reaches it.
    model = Model(params, config, backend=in_blocks(make_backend("numpy")))
    pieces = model.stream([1, 2, 3], max_tokens=20)
    with pytest.raises(gpt_xp.errors.NumericalError, match="not finite"):
        list(pieces)
