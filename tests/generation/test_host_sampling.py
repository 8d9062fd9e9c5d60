"""Choosing among the few tokens that top-k leaves: the same result as choosing among all, to the last bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params

from gpt_xp import Model
from gpt_xp.errors import NumericalError
from gpt_xp.generation import choosing, host_sampling
from gpt_xp.generation.host_sampling import choose_among_few
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.sampling import Choice, choose

XP = make_backend("numpy").xp
OFF: dict[str, Any] = {"seen": None, "allowed": None, "top_p": None, "min_p": None, "repetition_penalty": None}


def both(logits: np.ndarray, seed: int, **arguments: Any) -> tuple[Choice, Choice]:
    rows, n_vocab = logits.shape
    noise = np.stack([gumbel_noise(seed, row, 5, n_vocab) for row in range(rows)])
    few = choose_among_few(logits, lambda row, ids: noise[row, ids], **OFF | arguments, xp=XP)
    return few, choose(logits, noise=noise, **OFF | arguments, xp=XP)


def assert_equal(few: Choice, right: Choice) -> None:
    for name, one, other in zip(Choice._fields, few, right, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
        assert one.dtype == other.dtype, name


filters = st.fixed_dictionaries(
    {"top_k": st.integers(1, 60), "temperature": st.sampled_from([1e-30, 0.01, 0.8, 1.0, 10.0, 1e30])},
    optional={
        "top_p": st.floats(0.01, 0.99),
        "min_p": st.floats(0.001, 1),
        "repetition_penalty": st.floats(0.1, 10),
    },
)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 3).flatmap(lambda rows: st.lists(st.lists(st.integers(-40, 40), min_size=53, max_size=53),
                                                    min_size=rows, max_size=rows)),
    st.integers(2, 53), filters, st.sampled_from(["float32", "float64"]), st.booleans(), st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_the_same_as_among_all(
    values: list[list[int]], n_vocab: int, options: dict[str, Any], dtype: str, gaps: bool, seed: int
) -> None:
    """The scores have many ties, some of them caused by dividing by a large temperature."""
    logits = (np.array(values) / 4 + np.linspace(0, 1e-6, 53)).astype(dtype)[:, :n_vocab]
    random = np.random.RandomState(seed % 2**32)
    options["seen"] = random.rand(*logits.shape) < 0.3
    options["allowed"] = random.rand(n_vocab) < 0.7 if gaps else None
    # Tokens that were dropped have a large negative score. Divided by a small temperature, it overflows.
    with np.errstate(over="ignore"):
        assert_equal(*both(logits, seed, **options))


def test_the_same_for_a_whole_vocabulary() -> None:
    logits = (np.random.RandomState(3).standard_normal((5, 50257)) * 3).astype(np.float32)
    for seed in range(7):
        assert_equal(*both(logits, seed, temperature=0.8, top_k=40, top_p=0.95))
        assert_equal(*both(logits, seed, temperature=10, top_k=3))


@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_top_k_takes_this_way_where_the_host_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, calls = make_backend(name), []
    monkeypatch.setattr(
        choosing, "choose_among_few", lambda *args, **kwargs: calls.append(1) or choose_among_few(*args, **kwargs)
    )
    params = {"params": small_params("prime"), "config": CONFIGS["prime"]}
    model = Model(**params, backend=backend)
    for options, n_calls in (({}, 0), ({"temperature": 1.0}, 0), ({"temperature": 1.0, "top_k": 5}, 3)):
        model.generate([5, 3], max_tokens=3, ignore_eos=True, **options)
        assert len(calls) == n_calls


def test_numbers_that_are_not_finite_are_an_error() -> None:
    params = small_params("prime")
    params["ln_f"]["b"][0] = np.nan
    with pytest.raises(NumericalError, match="not finite"):
        Model(params, CONFIGS["prime"], backend=make_backend("numpy")).generate(
            [5], max_tokens=1, temperature=1.0, top_k=3
        )


def test_a_wrong_threshold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold that drops the last token that top-k keeps is found."""
    original = np.partition

    def above(*args: Any, **kwargs: Any) -> np.ndarray:
        return np.nextafter(original(*args, **kwargs), np.float32(np.inf))

    monkeypatch.setattr(host_sampling.np, "partition", above)
    with pytest.raises(AssertionError):
        test_the_same_for_a_whole_vocabulary()
