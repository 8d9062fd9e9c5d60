"""From a name to a directory: names, aliases, the default, working offline."""

import json
import shutil

import pytest
import small_published

import gpt_xp
from gpt_xp.errors import CheckpointError, GptXpError, ModelNotFoundError
from gpt_xp.hub import find as hub
from gpt_xp.hub import store
from gpt_xp.hub.published import MODELS, find_published

# --- names ----------------------------------------------------------------------------------------------------------

# The counts of the model cards, and of OpenAI's names.
PARAMS = {
    "124M": 124_439_808,
    "355M": 354_823_168,
    "774M": 774_030_080,
    "1558M": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


ALIASES = {
    "gpt2": "124M", "117M": "124M", "openai-community/gpt2": "124M", "124m": "124M", "GPT2": "124M",
    "gpt2-medium": "355M", "345M": "355M", "openai-community/gpt2-medium": "355M",
    "gpt2-large": "774M", "openai-community/gpt2-large": "774M",
    "gpt2-xl": "1558M", "openai-community/gpt2-xl": "1558M",
    "distilbert/distilgpt2": "distilgpt2",
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_the_published_models(name):
    model = find_published(name)
    assert model is not None
    assert model.name == name
    assert model.config.n_params == PARAMS[name]
    assert model.config.n_ctx == 1024
    assert model.config.eos_token_id == 50256
    # The published files hold the float32s, a header, and for the sizes that are known the masks of each layer.
    if model.weights.n_bytes is not None:
        masks = 4 * model.config.n_layer * 1024 * 1024
        assert 0 < model.weights.n_bytes - 4 * PARAMS[name] - masks < 50_000


def test_n_params_counts_what_there_is(shakespeare):
    assert shakespeare.config.n_params == sum(leaf.size for leaf in gpt_xp.tree.leaves(shakespeare.params))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert find_published(alias) is MODELS[ALIASES[alias]]


def test_names_are_told_apart():
    names = [name.lower() for name in hub.names()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("wrong", "first"), [("gpt2-medum", "gpt2-medium"), ("124", "124M"), ("1.5B", ""), ("shakespear", "shakespeare")]
)
def test_a_wrong_name_lists_the_right_ones_closest_first(home, wrong, first):
    with pytest.raises(ModelNotFoundError) as raised:
        gpt_xp.load(wrong)
    listed = str(raised.value).rpartition("one of: ")[2].split(", ")
    assert sorted(listed) == sorted(hub.names())
    assert set(MODELS) < set(listed)
    assert listed[0].startswith(first)
    assert not home.exists()


@pytest.mark.parametrize("name", ["../124M", "124M/..", "/etc", "", "a" * 5000, "a\0b", "hub", "124M/hub"])
def test_no_name_leads_anywhere_else(server, home, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptXpError):
        gpt_xp.load(name)
    assert not home.exists()


# --- offline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["GPT_XP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_fetched(server, home, monkeypatch, variable):
    for yes in ("1", "true", "YES", "on"):
        monkeypatch.setenv(variable, yes)
        with pytest.raises(ModelNotFoundError, match="gpt-xp models pull 124M"):
            gpt_xp.load("124M")
    assert not server.requests
    assert not home.exists()
    monkeypatch.setenv(variable, "0")
    gpt_xp.load("124M")
    asked = len(server.requests)
    monkeypatch.setenv(variable, "1")
    gpt_xp.load("124M")
    assert len(server.requests) == asked


# --- the default ------------------------------------------------------------------------------------------------------


def test_the_default_is_124m_if_it_is_here(server, monkeypatch):
    assert hub.default_model() == "shakespeare"
    assert gpt_xp.load().config.n_layer == 6
    assert not server.requests
    gpt_xp.load("124M")
    assert hub.default_model() == "124M"
    assert gpt_xp.load().config == small_published.CONFIG
    monkeypatch.setenv("GPT_XP_MODEL", "shakespeare")
    assert gpt_xp.load().config.n_layer == 6
    monkeypatch.setenv("GPT_XP_MODEL", "no-such-model")
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        gpt_xp.load()


def test_a_directory_comes_before_a_name(server, tmp_path, monkeypatch, shakespeare):
    shakespeare.save(tmp_path / "124M")
    monkeypatch.chdir(tmp_path)
    assert gpt_xp.load("124M").config == shakespeare.config
    assert not server.requests


# --- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["GPT_XP_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["~no-such-user/x", "x" * 300, "a/" * 3000, "/dev/null/x", "ä\n*?["])
def test_a_cache_folder_that_cannot_be_does_not_stop_the_bundled_model(home, monkeypatch, tmp_path, variable, value):
    monkeypatch.chdir(tmp_path)
    if variable != "GPT_XP_HOME":
        monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, value)
    assert hub.find_model() == hub.BUNDLED / "shakespeare"
    assert store.copies(MODELS["124M"]) == []


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("encoder.json",)])
def test_openais_vocabulary_alone_is_a_tokenizer(call, home, tmp_path, names):
    for name in names:
        shutil.copy(small_published.GOLDEN / name, tmp_path / name)
    if len(names) == 2:
        expected = gpt_xp.Tokenizer.from_directory(small_published.GOLDEN).encode("the inner")
        done = call("tokens", "-m", str(tmp_path), "--json", "the inner")
        assert [each["id"] for each in json.loads(done.out)["tokens"]] == expected
    else:
        assert "has encoder.json but not vocab.bpe" in call("tokens", "-m", str(tmp_path), "the").err
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        gpt_xp.load(tmp_path)


def test_a_step_of_gpt_2_simple_without_hparams_lacks_those_alone(home, tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(small_published.GOLDEN / name, tmp_path / name)
    shutil.copy(small_published.GOLDEN / "model.ckpt.index", tmp_path / "model-1000.index")
    with pytest.raises(CheckpointError, match=r"has model-1000\.index, .* but not hparams\.json; copy all the files"):
        gpt_xp.load(tmp_path)


@pytest.mark.parametrize("missing", ["hparams.json", "model.ckpt.index"])
def test_an_incomplete_checkpoint_of_openais_is_told_as_one(home, tmp_path, missing):
    shutil.copytree(small_published.GOLDEN, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"but not .*\b{missing}; copy all the files"):
        gpt_xp.load(tmp_path / "model")
