"""OpenAI's own files: found, refused where they are wrong, and converted bit for bit."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from checkpoint_files import WEIGHTS, assert_same, contents, file_bytes, listing
from openai_files import (
    CONFIG,
    GOLDEN,
    OPENAI_FILES,
    as_bfloat16,
    converted,
    make_tensors,
    no_tensorflow,
    variables,
    write_texts,
)
from safetensors import safe_open

from gpt_xp import Model, Tokenizer
from gpt_xp.checkpoint import openai as openai_checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.openai import convert, is_openai_layout, read_hparams
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError, ModelNotFoundError

# --- what is there --------------------------------------------------------------------------------------------------


def test_the_layout_is_known_by_two_files(folder):
    assert is_openai_layout(GOLDEN)
    assert is_openai_layout(str(folder))
    (folder / "model.ckpt.index").rename(folder / "model-1000.index")
    assert is_openai_layout(folder)
    (folder / "model-1000.index").unlink()
    assert not is_openai_layout(folder)
    (folder / "model.ckpt.index").touch()
    (folder / "hparams.json").unlink()
    assert not is_openai_layout(folder)


def test_no_directory_has_no_layout(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file", "nul\0"):
        assert not is_openai_layout(tmp_path / name)
        with pytest.raises(ModelNotFoundError, match="no directory"):
            convert(tmp_path / name)


def test_hparams_are_read():
    sizes = {"n_vocab": 263, "n_ctx": 11, "n_embd": 15, "n_head": 3, "n_layer": 2}
    assert read_hparams(GOLDEN) == read_hparams(str(GOLDEN)) == sizes


def test_other_hparams_are_ignored(folder):
    entries = json.loads((folder / "hparams.json").read_text()) | {"attn_dropout": 0.1}
    (folder / "hparams.json").write_text(json.dumps(entries))
    assert read_hparams(folder)["n_ctx"] == 11
    assert "attn_dropout" not in read_hparams(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_ctx": None}, "n_ctx is null; a whole number"),
        ({"n_layer": 0}, "n_layer is 0; a whole number"),
        ({"n_vocab": 2**31}, "n_vocab is 2147483648; a whole number"),
        ({"n_embd": "15"}, 'n_embd is "15"; a whole number'),
        ({"n_embd": 15.0}, r"n_embd is 15\.0; a whole number"),
        ({"n_head": True}, "n_head is true; a whole number"),
        ({"n_head": 2}, "n_embd 15 cannot be split over n_head 2"),
        ("n_head", "n_head is missing"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, change, complaint):
    entries = json.loads((folder / "hparams.json").read_text())
    if isinstance(change, str):
        del entries[change]
    else:
        entries |= change
    (folder / "hparams.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=rf"hparams\.json: {complaint}"):
        convert(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"n_ctx": 11, "n_ctx": 12}', "[" * 100_000])
def test_malformed_hparams_are_refused(folder, text):
    (folder / "hparams.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"hparams\.json holds"):
        convert(folder)


def test_missing_hparams_are_named(folder):
    (folder / "hparams.json").unlink()
    with pytest.raises(CheckpointError, match=r"no hparams\.json"):
        convert(folder)


# --- which checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "model-1000",
        "/content/checkpoint/run1/model-1000",
        "../../secret/model-1000",
        r"C:\\run1\\model-1000",
        "gs://bucket/model-1000",
    ],
)
def test_the_file_checkpoint_gives_a_name_in_its_own_directory(folder, tensorflow, path):
    (folder / "model-900.index").write_bytes(b"index 900")
    (folder / "model-1000.index").write_bytes(b"index 1000")
    lines = ['all_model_checkpoint_paths: "model-900"', f'model_checkpoint_path: "{path}"', "last_preserved: 1"]
    (folder / "checkpoint").write_text("\n".join(lines))
    convert(folder)
    assert tensorflow.opened == [str(folder / "model-1000")]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        'model_checkpoint_path: ""',
        'model_checkpoint_path: "run1/"',
        b"\xff\0",
        'model_checkpoint_path: "a\0b"',
    ],
)
def test_without_a_name_it_is_model_ckpt(folder, tensorflow, text):
    (folder / "checkpoint").unlink()
    if text is not None:
        (folder / "checkpoint").write_bytes(text if isinstance(text, bytes) else text.encode())
    convert(folder)
    assert tensorflow.opened == [str(folder / "model.ckpt")]


@pytest.mark.parametrize("text", [None, "", 'model_checkpoint_path: ""'])
def test_without_a_name_the_only_checkpoint_is_it(folder, tensorflow, text):
    (folder / "model.ckpt.index").rename(folder / "model-1000.index")
    (folder / ".index").touch()
    (folder / "checkpoint").unlink()
    if text is not None:
        (folder / "checkpoint").write_text(text)
    assert_same(converted(folder), make_tensors())
    assert tensorflow.opened == [str(folder / "model-1000")]


def test_of_several_checkpoints_one_must_be_named(folder, tensorflow):
    (folder / "model.ckpt.index").rename(folder / "model-1000.index")
    (folder / "model-900.index").write_bytes(b"index 900")
    (folder / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"several .*no file `checkpoint`.*: model-1000, model-900") as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert tensorflow.opened == []
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-900"')
    convert(folder)
    assert tensorflow.opened == [str(folder / "model-900")]


def test_a_checkpoint_that_is_named_and_missing_is_told_with_those_that_are_there(folder, tensorflow):
    (folder / "model.ckpt.index").rename(folder / "model-1000.index")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-900"')
    with pytest.raises(CheckpointError, match=r"has no model-900\.index.*name one that is there .*: model-1000$"):
        convert(folder)


@pytest.mark.parametrize("name", ["hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint"])
def test_a_pointer_of_git_lfs_is_told(folder, tensorflow, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 497759232\n")
    with pytest.raises(CheckpointError, match=rf"/{name} is only a pointer of Git LFS.*git lfs pull"):
        convert(folder)
    assert tensorflow.opened == []


@pytest.mark.parametrize("path", ["../outside/model-7", "{outside}/model-7", "model-7", ".."])
def test_nothing_outside_is_read(folder, tensorflow, path):
    outside = folder.parent / "outside"
    outside.mkdir()
    for name in ("model-7.index", ".index"):
        (outside / name).write_bytes(b"index 7")
        (folder.parent / name).write_bytes(b"index 7")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path.format(outside=outside)}"')
    with pytest.raises(CheckpointError, match=rf"has no {os.path.basename(path)}\.index"):
        convert(folder)
    assert tensorflow.opened == []


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
@pytest.mark.skipif(sys.platform == "win32", reason="names of POSIX")
def test_a_path_that_tensorflow_takes_for_a_pattern_is_refused(folder, tensorflow, name):
    convert(shutil.copytree(folder, folder.parent / "run]{1}"))
    with pytest.raises(CheckpointError, match=r"for a pattern, for its [\[*?]; rename"):
        convert(folder.rename(folder.parent / name))


def test_a_relative_directory_is_no_address(folder, tensorflow, monkeypatch):
    """TensorFlow would open gs://bucket."""
    address = folder.parent / "gs:" / "bucket"
    shutil.copytree(folder, address)
    monkeypatch.chdir(folder.parent)
    convert("gs://bucket")
    assert tensorflow.opened == [str(address / "model.ckpt")]


# --- converting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_directory_is_like_any_other_afterwards(folder, tensorflow, dtype):
    tensors = make_tensors(dtype=dtype)
    tensorflow.found = variables(tensors)
    convert(str(folder))
    assert listing(folder) == sorted([*OPENAI_FILES, WEIGHTS, "config.json"])
    assert read_config(folder) == CONFIG
    assert_same(read_params(folder, CONFIG, None), tensors)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    tokenizer = Tokenizer.from_directory(folder)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the inner")] == ["the", " ", "in", "n", "er"]
    assert Model(read_params(folder, CONFIG), CONFIG, tokenizer, "numpy").logits([1, 2]).shape == (2, 263)
    with safe_open(folder / WEIGHTS, framework="np") as file:
        assert set(file.keys()) == {f"transformer.{name}" for name in tensors}
        assert file.metadata()["format"] == "pt"  # without it transformers refuses the file


def test_bfloat16_is_kept_in_the_file_and_read_as_float32(folder, tensorflow):
    rounded, widened = as_bfloat16(make_tensors())
    tensorflow.found = variables(rounded)
    assert_same(converted(folder), widened, np.float32)
    with safe_open(folder / WEIGHTS, framework="np") as file:
        assert file.get_slice("transformer.wpe.weight").get_dtype() == "BF16"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_only_the_axis_that_must_go_goes(folder, tensorflow):
    config = GPT2Config(n_vocab=263, n_ctx=1, n_embd=1, n_head=1, n_layer=1, eos_token_id=262, bos_token_id=262)
    tensors = make_tensors(config)
    tensorflow.found = variables(tensors)
    assert tensorflow.found["model/h0/attn/c_proj/w"].shape == (1, 1, 1)
    write_texts(folder, config)
    assert_same(converted(folder), tensors)
    assert read_config(folder) == config


def test_what_an_optimizer_keeps_is_ignored(folder, tensorflow):
    slots = {f"{name}/{slot}": array for name, array in tensorflow.found.items() for slot in ("Adam", "Adam_1")}
    others = {"global_step": np.int64(7), "beta1_power": np.float32(0.9), "training/model/wte": np.ones(3)}
    tensorflow.found = slots | tensorflow.found | others
    assert_same(converted(folder), make_tensors())


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("model/ln_f/b", None, "model/ln_f/b is missing"),
        ("model/wpe", np.ones((15, 11), np.float32), r"model/wpe is \[15, 11\] instead of \[11, 15\]"),
        ("model/h1/attn/c_attn/w", np.ones((15, 45), np.float32), r"is \[15, 45\] instead of \[1, 15, 45\]"),
        ("model/h1/attn/c_attn/w", np.ones((1, 45, 15), np.float32), r"is \[1, 45, 15\] instead of \[1, 15, 45\]"),
        ("model/h2/ln_1/g", np.ones(15, np.float32), "'model/h2/ln_1/g' is no tensor"),
        ("model/h0/attn/rotary", np.ones(15, np.float32), "'model/h0/attn/rotary' is no tensor"),
        ("model/ln_f/g", np.ones(15, np.int32), "model/ln_f/g is int32 instead of one of float16, float32, float64"),
    ],
)
def test_variables_that_do_not_fit_are_named(folder, tensorflow, name, value, complaint):
    tensorflow.found = {**tensorflow.found, name: value}
    if value is None:
        del tensorflow.found[name]
    with pytest.raises(CheckpointError, match=f"the variables of .*{complaint}"):
        convert(folder)
    assert listing(folder) == OPENAI_FILES


def test_more_layers_than_variables_are_refused_at_once(folder, tensorflow):
    sizes = read_hparams(folder) | {"n_layer": 2_000_000_000}
    (folder / "hparams.json").write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError, match="2000000000 layers, but there are only 28 tensors"):
        convert(folder)


@pytest.mark.parametrize(
    ("change", "eos"),
    [({}, 262), ({"<|endoftext|>": 5}, 5), ({"<|endoftext|>": 263}, None), ({"<|endoftext|>": "x"}, None)],
)
def test_the_end_token_is_that_of_the_vocabulary(folder, tensorflow, change, eos):
    entries = json.loads((folder / "encoder.json").read_text()) | change
    (folder / "encoder.json").write_text(json.dumps(entries))
    convert(folder)
    assert read_config(folder).eos_token_id == eos


def test_without_a_vocabulary_there_is_no_end_token(folder, tensorflow):
    (folder / "encoder.json").unlink()
    convert(folder)
    assert read_config(folder).eos_token_id is None
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None


def test_an_up_to_date_conversion_is_kept_and_needs_no_tensorflow(folder, tensorflow, monkeypatch):
    convert(folder)
    before = {path.name: path.stat() for path in folder.iterdir()}
    monkeypatch.setattr(openai_checkpoint, "check_tensorflow", no_tensorflow)
    convert(folder)
    assert {path.name: path.stat() for path in folder.iterdir()} == before
    assert len(tensorflow.opened) == 1


def test_another_index_means_other_weights(folder, tensorflow):
    old = converted(folder)
    (folder / "model.ckpt.index").write_bytes(b"index 2")
    tensorflow.found = variables(make_tensors(seed=1))
    assert_same(converted(folder), make_tensors(seed=1))
    assert_same(old, make_tensors())  # arrays that are mapped stay as they were
    assert len(tensorflow.opened) == 2


def test_a_later_checkpoint_means_other_weights(folder, tensorflow):
    convert(folder)
    (folder / "model-20.index").write_bytes(b"index 2")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-20"')
    tensorflow.found = variables(make_tensors(seed=1))
    assert_same(converted(folder), make_tensors(seed=1))


@pytest.mark.parametrize("name", [WEIGHTS, f"{WEIGHTS}.index.json"])
def test_the_users_own_weights_are_left_alone(folder, tensorflow, name):
    own = file_bytes(make_tensors(seed=1))
    (folder / name).write_bytes(own)
    before = contents(folder)
    convert(folder)
    assert contents(folder) == before
    assert tensorflow.opened == []


def test_a_config_that_agrees_is_kept(folder, tensorflow):
    entries = {"model_type": "gpt2", "vocab_size": 263, "n_positions": 11, "n_embd": 15, "n_head": 3, "n_layer": 2}
    text = json.dumps(entries | {"eos_token_id": 7, "task": "poems"}).encode()
    (folder / "config.json").write_bytes(text)
    convert(folder)
    assert (folder / "config.json").read_bytes() == text
    assert_same(read_params(folder, read_config(folder)), make_tensors())


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"n_layer": 3}, CheckpointError, r"contradicts hparams\.json: n_layer 3 instead of 2\. Remove config\.json"),
        ({"n_embd": 21, "n_positions": 12}, CheckpointError, "n_ctx 12 instead of 11, n_embd 21 instead of 15"),
        ({"model_type": "gpt_neo"}, ConfigError, "'gpt_neo'"),
    ],
)
def test_a_config_that_contradicts_is_refused(folder, tensorflow, change, error, complaint):
    entries = {"model_type": "gpt2", "vocab_size": 263, "n_positions": 11, "n_embd": 15, "n_head": 3, "n_layer": 2}
    (folder / "config.json").write_text(json.dumps(entries | change))
    before = contents(folder)
    with pytest.raises(error, match=complaint):
        convert(folder)
    assert contents(folder) == before
    assert tensorflow.opened == []


def test_a_config_that_was_removed_is_made_without_tensorflow(folder, tensorflow, monkeypatch):
    convert(folder)
    before = contents(folder)
    (folder / "config.json").unlink()
    monkeypatch.setattr(openai_checkpoint, "check_tensorflow", no_tensorflow)
    convert(folder)
    assert contents(folder) == before
