"""Choosing the next token on every backend. The oracles are float64 arithmetic, and transformers in test_oracle.py."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_xp import Backend
from gpt_xp.errors import GptXpError, SettingError
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.sampling import Choice, choose, keep_likeliest
from gpt_xp.settings import GenerationSettings

random = np.random.RandomState(7)
LOGITS = (random.standard_normal((3, 101)) * 3).astype(np.float32)


def chosen(backend: Backend, logits: np.ndarray, **arguments: Any) -> Choice:
    arrays = {k: backend.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    return Choice(*(backend.to_numpy(part) for part in choose(backend.asarray(logits), **arrays, xp=backend.xp)))


def kept(backend: Backend, logits: np.ndarray, **filters: Any) -> np.ndarray:
    options = {"top_k": None, "top_p": None, "min_p": None} | filters
    scores = keep_likeliest(backend.asarray(logits), **options, xp=backend.xp)
    return backend.to_numpy(scores) > np.finfo(np.float32).min


def softmax64(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_greedy_takes_the_largest(backend: Backend) -> None:
    choice = chosen(backend, LOGITS)
    np.testing.assert_array_equal(choice.token, LOGITS.argmax(-1))
    expected = np.log(softmax64(LOGITS)).max(-1)
    np.testing.assert_allclose(choice.logprob, expected, rtol=1e-5)
    ordered = np.sort(LOGITS, axis=-1)
    np.testing.assert_allclose(choice.margin, ordered[:, -1] - ordered[:, -2], rtol=1e-5)


def test_ties_go_to_the_lowest_id(backend: Backend) -> None:
    logits = np.zeros((2, 11), dtype=np.float32)
    logits[0, [3, 7]] = 1
    choice = chosen(backend, logits)
    assert choice.token.tolist() == [3, 0]
    assert choice.margin.tolist() == [0, 0]


def test_top_k_1_is_greedy_even_among_ties(backend: Backend) -> None:
    logits = np.zeros((1, 11), dtype=np.float32)
    noise = gumbel_noise(1, 2, 3, 11)[None]
    assert chosen(backend, logits, noise=noise, temperature=1.0, top_k=1).token.tolist() == [0]


def test_ids_without_a_token_are_never_chosen(backend: Backend) -> None:
    allowed = np.ones(101, dtype=bool)
    allowed[LOGITS.argmax(-1)] = False
    expected = np.where(allowed, LOGITS, -np.inf).argmax(-1)
    np.testing.assert_array_equal(chosen(backend, LOGITS, allowed=allowed).token, expected)


@pytest.mark.parametrize(
    ("temperature", "penalty", "filters"),
    [
        (None, 1.3, {}),
        (None, 1e30, {}),
        (0.7, None, {}),
        (0.01, 1.3, {"top_k": 5}),
        (1e-30, None, {"top_p": 0.9}),
        (1e-30, 1.3, {"min_p": 0.1}),
        (1e30, 1e-30, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}),
    ],
)
def test_rows_without_a_token_are_as_if_they_were_not_there(
    backend: Backend, filters: dict[str, Any], temperature: float | None, penalty: float | None
) -> None:
    # nanoGPT's table has 50304 rows for 50257 tokens. Warnings are errors here, so nothing may overflow.
    padded = np.concatenate([LOGITS, np.full((3, 2), 9), np.full((3, 4), -9)], axis=1).astype(np.float32)
    options = {"temperature": temperature, "repetition_penalty": penalty, **filters}
    noise, seen = np.stack([gumbel_noise(1, row, 3, 107) for row in range(3)]), np.arange(107)[None] % 7 < [[3]] * 3

    def choice(n: int) -> Choice:
        arrays = {"noise": noise[:, :n] if temperature else None, "seen": seen[:, :n] if penalty else None}
        return chosen(backend, padded[:, :n], allowed=np.arange(n) < 101, **arrays, **options)

    np.testing.assert_array_equal(choice(107).token, choice(101).token)
    np.testing.assert_allclose(choice(107).margin, choice(101).margin, rtol=1e-5)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 13, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_keep_what_they_should(backend: Backend, filters: dict[str, Any]) -> None:
    expected = np.ones_like(LOGITS, dtype=bool)
    for row, logits in zip(expected, LOGITS, strict=True):
        order = np.argsort(-logits, kind="stable")
        row[order[filters.get("top_k", 101) :]] = False
        probs = np.where(row, softmax64(logits), 0) / softmax64(logits)[row].sum()
        if "top_p" in filters:
            reached = int((np.cumsum(probs[order]) < filters["top_p"]).sum()) + 1
            row[order[reached:]] = False
        row[probs < filters.get("min_p", 0) * probs.max()] = False
    np.testing.assert_array_equal(kept(backend, LOGITS, **filters), expected)


def test_filters_keep_the_lowest_ids_among_equals(backend: Backend) -> None:
    logits = np.array([[0, 2, 1, 2, 1, 1, 0]], dtype=np.float32)
    assert kept(backend, logits, top_k=3).tolist() == [[False, True, True, True, False, False, False]]
    equal = np.zeros((1, 10), dtype=np.float32)
    assert kept(backend, equal, top_p=0.35).sum() == 4
    assert kept(backend, equal, top_p=0.35)[0, :4].all()


def test_repetition_penalty(backend: Backend) -> None:
    logits = np.array([[3.0, 2.5, -1.0, -2.0]], dtype=np.float32)
    seen = np.array([[True, False, False, False]])
    assert chosen(backend, logits, seen=seen, repetition_penalty=2.0).token.tolist() == [1]
    below = np.array([[-1.0, -1.5]], dtype=np.float32)  # Negative scores are multiplied, because division raises them.
    assert chosen(backend, below, seen=np.array([[True, False]]), repetition_penalty=2.0).token.tolist() == [1]


def test_tiny_and_huge_temperatures_are_finite(backend: Backend) -> None:
    noise = np.stack([gumbel_noise(1, row, 0, 101) for row in range(3)])
    cold = chosen(backend, LOGITS, noise=noise, temperature=1e-30)
    np.testing.assert_array_equal(cold.token, LOGITS.argmax(-1))
    hot = chosen(backend, LOGITS, noise=noise, temperature=1e30)
    np.testing.assert_array_equal(hot.token, noise.argmax(-1))
    assert np.isfinite(cold.logprob).all()
    assert np.isfinite(hot.logprob).all()


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = np.array([[0.0, 1.0, 2.0, -1.0, 0.5]], dtype=np.float32)
    n = 20_000
    noise = np.stack([gumbel_noise(3, 0, step, 5) for step in range(n)])
    tokens = choose(np.repeat(logits, n, axis=0), noise=noise, temperature=0.7).token
    counts = np.bincount(tokens, minlength=5)
    expected = softmax64(logits / 0.7)[0] * n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 18.5  # the 0.1% point at 4 degrees of freedom


def test_the_same_draws_on_every_backend(backend: Backend) -> None:
    from libraries import make_backend

    numpy = make_backend("numpy")
    wide = (np.random.RandomState(11).standard_normal((2, 50257)) * 3).astype(np.float32)
    for step, options in enumerate(
        [{}, {"top_k": 40}, {"top_p": 0.95}, {"top_k": 400, "top_p": 0.9, "min_p": 0.01}] * 3
    ):
        noise = np.stack([gumbel_noise(9, row, step, 50257) for row in range(2)])
        ours = chosen(backend, wide, noise=noise, temperature=0.9, **options)
        reference = chosen(numpy, wide, noise=noise, temperature=0.9, **options)
        differ = ours.token != reference.token
        assert not differ.any() or reference.margin[differ].max() < 1e-4, "more than a tie"
        assert not differ.any(), "12 pairs of draws and a tie among them: look at it"


def test_choosing_jitted_is_choosing_eagerly() -> None:
    from libraries import make_backend

    jax = make_backend("jax")
    noise = jax.asarray(np.stack([gumbel_noise(1, row, 0, 101) for row in range(3)]))
    compiled = jax.compile(choose, static=("top_k",))
    for numbers in ({}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}):
        arguments = {"noise": noise, **numbers} if numbers else {}
        eager = choose(jax.asarray(LOGITS), **arguments)
        jitted = compiled(jax.asarray(LOGITS), **arguments)
        np.testing.assert_array_equal(jitted.token, eager.token)
        np.testing.assert_allclose(jitted.logprob, eager.logprob, rtol=1e-5)


filters = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 60),
        "top_p": st.floats(0.01, 0.99),
        "min_p": st.floats(0.001, 1),
        "temperature": st.floats(0.01, 10),
    },
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=53), filters, st.integers(0, 2**64 - 1))
def test_every_draw_is_one_that_the_filters_keep(values: list[int], options: dict[str, Any], seed: int) -> None:
    """The scores have many ties. The oracle is a second implementation of the filters in float64."""
    logits = np.array([values], dtype=np.float32) / 4
    options = {"temperature": 1.0} | options
    choice = choose(logits, noise=gumbel_noise(seed, 0, 0, len(values))[None], **options)
    token = int(choice.token[0])
    probs = softmax64(logits / options["temperature"])[0]
    rank = int((probs > probs[token]).sum() + (probs[:token] == probs[token]).sum())
    assert rank < options.get("top_k", len(values))
    assert choice.margin[0] >= 0
    assert probs[token] >= options.get("min_p", 0) * probs.max() * (1 - 1e-5)
    larger = probs[np.argsort(-probs, kind="stable")][: options.get("top_k", len(values))]
    assert larger[:rank].sum() / larger.sum() <= options.get("top_p", 1) + 1e-5


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be 0 .greedy. or a number"),
        ("temperature", math.nan, "temperature"),
        ("temperature", math.inf, "temperature"),
        ("temperature", None, "temperature"),
        ("temperature", "1", "temperature"),
        ("top_k", -1, "top_k must be a whole number of at least 0"),
        ("top_k", 1.5, "top_k"),
        ("top_k", True, "top_k"),
        ("top_p", 0, "top_p must be a number above 0 and at most 1"),
        ("top_p", 1.01, "top_p"),
        ("min_p", -0.1, "min_p must be a number from 0"),
        ("min_p", 2, "min_p"),
        ("repetition_penalty", 0, "repetition_penalty must be a number from"),
        ("seed", -1, "seed must be a whole number from 0 to 2"),
        ("seed", 2**64, "seed"),
        ("seed", 1.0, "seed"),
    ],
)
def test_values_that_make_no_sense(option: str, value: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        GenerationSettings(**{option: value})
    assert repr(value) in str(error.value)
    assert isinstance(error.value, GptXpError)


def test_values_that_turn_a_filter_off() -> None:
    off = GenerationSettings(temperature=1, top_k=0, top_p=1, min_p=0, repetition_penalty=1).filters
    assert off == GenerationSettings(temperature=1).filters
    assert GenerationSettings(top_k=5, top_p=0.5, min_p=0.5).filters == GenerationSettings().filters  # greedy
