"""config.json: GPT-2 in its spellings is read, and another model is refused with the entry that differs."""

import json

import pytest
from checkpoint_files import CONFIG, config_entries, config_of

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError


def test_the_published_config_is_read(tmp_path):
    published = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
    (tmp_path / "config.json").write_text(published)
    assert read_config(tmp_path) == GPT2Config(50257, 1024, 768, 12, 12, 50256, 50256)


def test_n_positions_counts_and_n_ctx_is_its_old_name(tmp_path):
    assert config_of(tmp_path, n_positions=41, n_ctx=37).n_ctx == 41
    entries = config_entries(CONFIG)
    del entries["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_config(tmp_path).n_ctx == 37


@pytest.mark.parametrize(
    ("entry", "eos"), [(5, 5), (0, 0), (None, None), ([7], 7), ([8, 3], (8, 3)), ([], None), (101, None), (-1, None)]
)
def test_eos_token_id(tmp_path, entry, eos):
    assert config_of(tmp_path, eos_token_id=entry).eos_token_id == eos


def test_ids_beyond_the_vocabulary_end_nothing(tmp_path):
    assert config_of(tmp_path, eos_token_id=[101, 7, 9]).eos_token_id == (7, 9)
    assert config_of(tmp_path, eos_token_id=[101, 7]).eos_token_id == 7


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_an_absent_role_is_left_to_the_tokenizer(tmp_path, key):
    entries = config_entries(CONFIG)
    del entries[key]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert getattr(read_config(tmp_path), key) is None


def test_generation_config_comes_before_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_entries(CONFIG)))
    for stated, eos, bos in (
        ({"eos_token_id": [7, 11]}, (7, 11), 3),
        ({"eos_token_id": None, "bos_token_id": 13}, 5, 13),
        ({}, 5, 3),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
        config = read_config(tmp_path)
        assert (config.eos_token_id, config.bos_token_id) == (eos, bos)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is"):
        read_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "same",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": None},
        {"n_inner": 156},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        {"reorder_and_upcast_attn": True},
        {"architectures": ["GPT2Model"]},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},  # the weights then say whether it is GPT-2
    ],
)
def test_the_same_mathematics_in_other_words_is_accepted(tmp_path, same):
    assert config_of(tmp_path, **same) == CONFIG


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "gpt_neo"},
        {"model_type": None},
        {"model_type": ["gpt2"]},
        {"activation_function": "gelu"},
        {"activation_function": ["gelu_new"]},
        {"layer_norm_epsilon": 1e-6},
        {"layer_norm_epsilon": "1e-05"},
        {"layer_norm_epsilon": float("nan")},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": 1},
        {"add_cross_attention": True},
        {"tie_word_embeddings": None},
        {"n_inner": 155},
        {"n_inner": 156.0},
        {"vocab_size": "101"},
        {"vocab_size": 101.0},
        {"vocab_size": True},
        {"n_positions": None},
        {"n_positions": 0},
        {"n_embd": 10**1000},
        {"n_head": -3},
        {"n_head": 2},
        {"n_layer": [2]},
        {"eos_token_id": "<|endoftext|>"},
        {"eos_token_id": [5, "a"]},
        {"eos_token_id": True},
    ],
    ids=lambda other: f"{other!s:.40}",
)
def test_another_model_is_refused(tmp_path, other):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **other)
    message = str(caught.value)
    assert "config.json" in message
    assert next(iter(other)) in message
    assert len(message) < 500


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "n_embd", "n_head", "n_layer"])
def test_missing_entries_are_named(tmp_path, key):
    entries = config_entries(CONFIG)
    del entries[key]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=key):
        read_config(tmp_path)


def test_a_missing_model_type_is_a_line_to_add(tmp_path):
    entries = config_entries(CONFIG)
    del entries["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r'config\.json: model_type is missing.*add the line "model_type": "gpt2"'):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    with pytest.raises(ConfigError, match="model_type is None; only 'gpt2' can be loaded: take"):
        read_config(tmp_path)


def test_a_missing_context_size_has_its_present_name(tmp_path):
    entries = config_entries(CONFIG)
    del entries["n_positions"], entries["n_ctx"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="n_positions is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "malformed JSON"),
        (b'{"n_head": 3', "malformed JSON"),
        (b"\xff\xfe{}", "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"n_head": ' + b"9" * 5000 + b"}", "malformed JSON"),
        (b'{"n_head": 3, "n_head": 5}', "'n_head' is there 2 times"),
        (b"[1]", "no JSON object"),
        (b" " * 10_000_001, "larger than"),
    ],
    ids=["empty", "cut", "bytes", "deep", "digits", "twice", "list", "large"],
)
def test_a_malformed_config_is_refused(tmp_path, text, complaint):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{complaint}"):
        read_config(tmp_path)
