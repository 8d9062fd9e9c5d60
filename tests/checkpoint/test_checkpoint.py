"""A model's directory is read at once: config, params, quantization, tokenizer, and the entries that are carried."""

import builtins
import collections
import os
import shutil

import pytest
from folders import SHAKESPEARE
from libraries import make_backend, quantized

import gpt_xp
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import CheckpointError, ConfigError, TokenizerError
from gpt_xp.tree import leaves


def equal(one, other):
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_all_is_read_at_once(dtype):
    found = checkpoint.read(SHAKESPEARE, dtype)
    assert found.config == read_config(SHAKESPEARE)
    assert equal(found.params, read_params(SHAKESPEARE, found.config, dtype))
    assert found.quantization is None
    assert found.tokenizer.encode("ROMEO:") == gpt_xp.Tokenizer.from_directory(SHAKESPEARE).encode("ROMEO:")
    assert found.carried.directory == SHAKESPEARE
    assert found.carried.config["model_type"] == "gpt2"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_params_are_as_stored(tmp_path, kind):
    backend = quantized(make_backend("numpy"))  # or the test is skipped
    gpt_xp.load("shakespeare", backend=backend, quantize=kind).save(tmp_path)
    found = checkpoint.read(tmp_path, "float32")
    assert found.quantization == kind
    assert str(found.params["wte"].q.dtype) == {"int8": "int8", "int4": "uint8"}[kind]


def test_each_config_is_opened_once(tmp_path, monkeypatch):
    shutil.copytree(SHAKESPEARE, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    opened, real = collections.Counter(), open

    def counting(path, *args, **options):
        opened[os.path.basename(path) if isinstance(path, str) else path] += 1
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", counting)
    gpt_xp.load(tmp_path / "model", backend="numpy")
    assert opened["config.json"] == opened["generation_config.json"] == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [("config.json", CheckpointError), ("model.safetensors", CheckpointError), ("merges.txt", TokenizerError)],
)
def test_a_missing_file_is_one_error(tmp_path, name, error):
    shutil.copytree(SHAKESPEARE, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(error, match=name):
        checkpoint.read(tmp_path)


def test_untied_matrices_of_which_one_is_missing_are_refused(tmp_path):
    shutil.copytree(SHAKESPEARE, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.json").read_text()
    assert '"tie_word_embeddings": true' in text
    (tmp_path / "config.json").write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(CheckpointError, match="these are two matrices"):
        checkpoint.read(tmp_path)


def test_a_quantization_of_another_program_is_refused(tmp_path):
    shutil.copytree(SHAKESPEARE, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config is .*gptq"):
        checkpoint.read(tmp_path)
