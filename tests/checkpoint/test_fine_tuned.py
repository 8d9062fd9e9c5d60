"""A fine-tuned GPT-2 as transformers saves it: tokens of its own that begin, end and pad a text, and added words."""

from pathlib import Path
from typing import Any

import pytest

import gpt_xp

pytestmark = pytest.mark.oracle

TEXT = "<|BOS|>Good dignums<|SEP|> morrow, dignums!"


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason="the oracle is torch and transformers")
    return pytest.importorskip("transformers", reason="the oracle is torch and transformers")


@pytest.fixture(scope="module")
def tuned(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with tokens of its own, the table enlarged for them, saved by transformers."""
    folder, bundled = tmp_path_factory.mktemp("tuned"), gpt_xp.hub.find.BUNDLED / "shakespeare"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    tokenizer.add_special_tokens({"bos_token": "<|BOS|>", "eos_token": "<|EOS|>", "pad_token": "<|PAD|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|SEP|>"]})
    tokenizer.add_tokens(["dignums", "<speaker1>"])
    model = transformers.GPT2LMHeadModel.from_pretrained(bundled)
    model.resize_token_embeddings(len(tokenizer))
    model.config.bos_token_id, model.config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # A token that the model does choose, beside the one that it never learned.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.encode(",")[0]]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def transformers_reads(transformers: Any, folder: Path) -> tuple[Any, Any]:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype="float32").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def generated(model: Any, ids: list[int]) -> list[int]:
    """The greedy continuation by transformers, without the token that ends it."""
    import torch

    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    return out[:-1] if out[-1] in ends else out


def perplexity(model: Any, ids: list[int]) -> float:
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


@pytest.mark.parametrize("which", ["as transformers saves it", "saved again by gpt-xp"])
def test_a_fine_tuned_model_is_that_of_transformers(transformers: Any, tuned: Path, which: str, tmp_path: Path) -> None:
    folder = tuned
    if which == "saved again by gpt-xp":
        folder = tmp_path / "again"
        gpt_xp.load(tuned).save(folder)
    model, tokenizer = transformers_reads(transformers, folder)
    ours = gpt_xp.load(folder)
    ids = tokenizer(TEXT)["input_ids"]
    assert ours.tokenizer is not None
    assert ours.tokenizer.encode(TEXT, special_tokens=True) == ids
    out = ours.generate(TEXT, special_tokens=True, max_tokens=40)
    assert out.finish_reason == "eos"
    assert out.token_ids == generated(model, ids)
    assert ours.score(TEXT, special_tokens=True).perplexity == pytest.approx(perplexity(model, ids), rel=1e-4)
    begun = generated(model, [model.generation_config.bos_token_id])
    assert ours.generate("", max_tokens=40).token_ids == begun
