"""Faults of the model and of the timeout are errors of `conform`, before a library is imported."""

import dataclasses
import math
import shutil
import threading

import pytest

import gpt_xp
from gpt_xp.conformance import run
from gpt_xp.conformance.checks import Checks
from gpt_xp.conformance.inputs import TEXT_TOKENS, prompts_of
from gpt_xp.conformance.run import check_names, conform
from gpt_xp.errors import CheckpointError, PromptError, SettingError, TokenizerError
from gpt_xp.hub.find import find_model


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    monkeypatch.setattr(run, "LibraryProcess", None)


@pytest.fixture
def bundled():
    return gpt_xp.load("shakespeare")


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(find_model("shakespeare"), tmp_path / "model")


def both_raise(error, message, **arguments):
    for function in (conform, check_names):
        with pytest.raises(error, match=message):
            function("numpy", **arguments)


def saved(model, folder, config, **params):
    gpt_xp.Model(model.params | params, config, model.tokenizer).save(folder)
    return folder


def test_a_truncated_model_is_an_error_of_the_model(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    both_raise(CheckpointError, "model.safetensors", model=copied)


def test_a_model_without_a_tokenizer_is_an_error_of_the_model(copied):
    (copied / "vocab.json").unlink()
    both_raise(TokenizerError, "vocab.json", model=copied)


def test_the_context_must_hold_the_prompts_and_the_text(bundled, tmp_path):
    first, second = prompts_of(bundled.tokenizer)
    needed = max(len(first) + TEXT_TOKENS, len(second))
    for n_ctx in (needed - 1, needed):
        config = dataclasses.replace(bundled.config, n_ctx=n_ctx)
        saved(bundled, tmp_path / str(n_ctx), config, wpe=bundled.params["wpe"][:n_ctx])
    message = f"a context of {needed} tokens, and this model has {needed - 1}"
    both_raise(PromptError, message, model=tmp_path / str(needed - 1))
    assert "text" in check_names("numpy", tmp_path / str(needed))
    checks = Checks("numpy", tmp_path / str(needed), None, [])
    for with_cache in (True, False):
        assert checks.text(with_cache).is_ok
        assert all(each.is_ok for each in checks.layers(with_cache))
    assert all(checks.program(name).is_ok for name in ("forward pass", "cache", "loss"))


def test_the_vocabulary_must_hold_the_prompts(bundled, tmp_path):
    config = dataclasses.replace(bundled.config, n_vocab=20)
    folder = saved(bundled, tmp_path / "model", config, wte=bundled.params["wte"][:20])
    both_raise(PromptError, "is not in the model's vocabulary", model=folder)


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan, 2 * threading.TIMEOUT_MAX])
def test_a_timeout_that_nothing_can_wait_is_refused(timeout):
    both_raise(SettingError, "timeout must be more than 0 and at most", timeout=timeout)
