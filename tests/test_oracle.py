"""The goldens made again, and what needs torch and transformers at hand: pytest -m oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from folders import GOLDEN_FILES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Model
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.sampling import choose, keep_likeliest, penalize

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch and transformers about themselves.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def _oracles() -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev,oracle]'")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev,oracle]'")


@pytest.mark.parametrize("name", CONFIGS)
def test_goldens_are_what_transformers_computes(name: str) -> None:
    import make_goldens

    goldens = np.load(GOLDEN_FILES / "logits.npz")
    for key, value in make_goldens.golden(name).items():
        by_loss = key.endswith(("/loss", "/gradient"))
        assert_values(value, goldens[key], TOLERANCE["gradient of transformers", "float64"] if by_loss else 1e-10)


def test_the_greedy_text_is_what_transformers_writes() -> None:
    import make_goldens

    assert make_goldens.shakespeare() == json.loads((GOLDEN_FILES / "shakespeare.json").read_text())


@pytest.mark.parametrize("name", ["prime", "124M-ratios"])
def test_saved_models_are_read_by_transformers(tmp_path: Path, name: str) -> None:
    import torch
    import transformers

    model = Model(small_params(name), CONFIGS[name], backend=make_backend("numpy"))
    gpt_xp.save(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = small_tokens(name)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float32"])


def test_models_that_transformers_saves_are_read(tmp_path: Path) -> None:
    import torch
    import transformers

    directory = gpt_xp.hub.find.find_model()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="3MB")
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "tokenizer.json").exists()
    ours, bundled = gpt_xp.load(tmp_path, backend="numpy"), gpt_xp.load("shakespeare", backend="numpy")
    assert ours.generate("ROMEO:").text == bundled.generate("ROMEO:").text
    gpt_xp.save(ours, tmp_path)  # over the files that are mapped
    assert gpt_xp.load(tmp_path, backend="numpy").generate("ROMEO:").text == bundled.generate("ROMEO:").text


def test_planted_activations_in_half_precision_as_in_torch() -> None:
    """The size of the error that half precision makes in the planted model, in torch: what the tolerance allows."""
    import make_goldens
    import torch

    goldens = np.load(GOLDEN_FILES / "logits.npz")
    model = make_goldens.transformers_model(CONFIGS["planted"], small_params("planted")).to(torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.tensor(small_tokens("planted"), dtype=torch.long)).logits.float().numpy()
    assert_values(logits[:, ::3], goldens["planted/logits"], TOLERANCE["logits", "bfloat16"])


# Sampling against transformers' own processors.

logits_lists = st.lists(st.integers(-400, 400).map(lambda n: n / 16), min_size=11, max_size=53, unique=True)


def processed(logits: np.ndarray, processors: list[Any], ids: list[int]) -> np.ndarray:
    import torch

    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor([ids]), scores)
    return scores.numpy()


@settings(deadline=None, max_examples=200)
@given(
    logits_lists, st.integers(1, 60), st.floats(0.05, 0.99), st.floats(0.001, 0.9), st.floats(0.1, 5), st.floats(0.5, 2)
)
def test_filters_are_those_of_transformers(
    values: list[float], top_k: int, top_p: float, min_p: float, temperature: float, penalty: float
) -> None:
    from transformers.generation import logits_process as theirs

    logits = np.array([values], dtype=np.float32)
    ids = [0, 3, 7]
    expected = processed(
        logits,
        [
            theirs.RepetitionPenaltyLogitsProcessor(penalty),
            theirs.TemperatureLogitsWarper(temperature),
            theirs.TopKLogitsWarper(top_k),
            theirs.TopPLogitsWarper(top_p),
            theirs.MinPLogitsWarper(min_p),
        ],
        ids,
    )[0]
    xp = make_backend("numpy").xp
    seen = np.zeros_like(logits, dtype=bool)
    seen[0, ids] = True
    scores = np.where(seen, penalize(logits, penalty, xp), logits)
    scores = (scores - scores.max()) / np.float32(temperature)
    assume(np.diff(np.sort(scores[0])).min() > 1e-4)  # transformers has another order among equals
    ours = keep_likeliest(scores, top_k, top_p, min_p, xp)[0]
    kept, theirs_kept = ours > np.finfo(np.float32).min, np.isfinite(expected)
    differ = np.flatnonzero(kept != theirs_kept)
    if differ.size:  # only where the probability is at the border of top-p or min-p to the last digits
        probs = np.exp(scores[0].astype(np.float64))
        order = np.argsort(-probs, kind="stable")
        inside = order[: min(top_k, len(probs))]
        before = np.cumsum(probs[inside]) / probs[inside].sum()
        near_p = np.abs(before - top_p).min() < 1e-5
        near_min = np.abs(probs[differ] / probs.max() - min_p).max() < 1e-5
        assert near_p or near_min
    else:
        np.testing.assert_allclose(np.diff(ours[kept]), np.diff(expected[theirs_kept]), atol=1e-3, rtol=1e-4)
        noise = gumbel_noise(1, 0, 0, len(values))[None]
        token = choose(logits, noise=noise, seen=seen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                       repetition_penalty=penalty).token[0]  # fmt: skip
        assert theirs_kept[token]
