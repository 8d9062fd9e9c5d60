"""OpenAI's own files: found, refused where they are wrong, and converted bit for bit, with TensorFlow and without."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import PUBLISHED_HEADER, assert_same, file_bytes, leaves, nested
from commands import PATIENCE
from comparison import TOLERANCE, assert_values
from folders import GOLDEN_FILES
from naive_gpt2 import gpt2 as naive_gpt2
from openai_files import CONFIG, FakeReader, make_tensors, variables, write_texts
from safetensors import safe_open

from gpt_xp import Model, Tokenizer
from gpt_xp.checkpoint import openai as openai_checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.openai import check_tensorflow, convert, is_openai_layout, read_hparams
from gpt_xp.checkpoint.weights import align_weights, read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError, DeviceMemoryError, ModelNotFoundError
from gpt_xp.installation import install_command

GOLDEN = GOLDEN_FILES / "openai"
WEIGHTS = "model.safetensors"
OPENAI_FILES = ["checkpoint", "encoder.json", "hparams.json", "model.ckpt.index", "vocab.bpe"]


@pytest.fixture
def folder(tmp_path):
    """OpenAI's files but for the tensors, which the fake TensorFlow has."""
    directory = write_texts(tmp_path / "model")
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (directory / "model.ckpt.index").write_bytes(b"index 1")
    return directory


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def converted(directory, dtype=None):
    convert(directory)
    return read_params(directory, read_config(directory), dtype)


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


def as_bfloat16(tensors):
    """The same tensors in bfloat16, and what those are in float32."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; it comes with JAX")

    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    return rounded, {name: array.astype(np.float32) for name, array in rounded.items()}


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


# --- converting again, and not ----------------------------------------------------------------------------------------


def no_tensorflow():
    raise CheckpointError("TensorFlow was wanted")


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


# --- converting, when it fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_conversion_that_is_stopped_is_finished_by_the_next(folder, tensorflow, monkeypatch, stopped_at):
    replace, calls = os.replace, []

    def stop(source, destination):
        calls.append(os.path.basename(destination))
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(folder)
    assert calls == [WEIGHTS, "config.json"][:stopped_at]
    assert listing(folder) == sorted([*OPENAI_FILES, WEIGHTS][: len(OPENAI_FILES) + stopped_at - 1])
    assert_same(converted(folder), make_tensors())
    assert len(tensorflow.opened) == 3 - stopped_at


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (errno.EACCES, r"cannot write .*model\.safetensors \(Permission denied\); copy .* where you may write"),
        (errno.EROFS, r"cannot write .*model\.safetensors \(Read-only file system\); copy .* where you may write"),
        (errno.ENOSPC, r"cannot write .*model\.safetensors \(No space left on device\); it needs .* there: make room"),
    ],
)
@pytest.mark.parametrize("former", [False, True])
def test_a_directory_that_cannot_be_written_to(folder, tensorflow, monkeypatch, number, complaint, former):
    if former:
        convert(folder)
        (folder / "model.ckpt.index").write_bytes(b"index 2")
    before = contents(folder)

    def refuse(path, *args):
        Path(path).write_bytes(b"begun")
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(openai_checkpoint, "write_safetensors", refuse)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError, OSError])
def test_what_tensorflow_finds_wrong_is_one_error(folder, tensorflow, monkeypatch, error):
    def fail(self, name):
        if name.endswith("c_fc/b"):
            raise error("Checksum does not match\n  in a long\n  trace")
        return self.found[name]

    monkeypatch.setattr(FakeReader, "get_tensor", fail)
    with pytest.raises(
        CheckpointError, match=r"model\.ckpt is truncated, damaged .*\(Checksum does not match\).*again"
    ):
        convert(folder)
    assert listing(folder) == OPENAI_FILES


def test_memory_that_runs_out_is_no_damage(folder, tensorflow, monkeypatch):
    def fail(self, name):
        raise MemoryError

    monkeypatch.setattr(FakeReader, "get_tensor", fail)
    with pytest.raises(DeviceMemoryError, match="not enough memory"):
        convert(folder)


def test_files_reach_the_disk_before_they_take_their_names(folder, tensorflow, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(os.path.basename(new)), replace(old, new)))
    convert(folder)
    assert events == ["sync", WEIGHTS, "sync", "config.json"]


def test_two_at_once_do_each_other_no_harm(folder, tensorflow, monkeypatch):
    both = threading.Barrier(2, timeout=PATIENCE)
    errors = []

    def read(self, name):
        if name.endswith("wpe"):
            both.wait()  # now both are in the middle
        return self.found[name]

    def run():
        try:
            convert(folder)
        except BaseException as error:  # a thread would swallow it
            errors.append(error)

    monkeypatch.setattr(FakeReader, "get_tensor", read)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(tensorflow.opened) == 2
    assert listing(folder) == sorted([*OPENAI_FILES, WEIGHTS, "config.json"])
    assert_same(converted(folder), make_tensors())


# --- TensorFlow missing, broken, talkative --------------------------------------------------------------------------


def test_a_missing_tensorflow_is_one_error_with_the_way_out(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    with pytest.raises(CheckpointError) as caught:
        check_tensorflow()
    message = str(caught.value)
    assert install_command("tensorflow") in message
    assert "gpt-xp models pull NAME" in message
    assert "once" in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match="TensorFlow"):
        convert(folder)
    assert listing(folder) == OPENAI_FILES


def run_python(code, path=None, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=kept | {"PYTHONPATH": str(path or "")} | environment,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_looking_loads_no_tensorflow(folder):
    code = f"""
import sys
from gpt_xp.checkpoint import openai as oc
assert oc.is_openai_layout({str(folder)!r}) and oc.read_hparams({str(folder)!r})
try:
    oc.check_tensorflow()
except oc.CheckpointError:
    pass
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
    assert run_python(code).stderr == ""


CONVERT = """
import os, sys
from gpt_xp.checkpoint.openai import convert
try:
    convert(sys.argv[1] if len(sys.argv) > 1 else {folder!r})
finally:
    os.write(2, b"after " + os.environ.get("TF_CPP_MIN_LOG_LEVEL", "unset").encode())
"""
# Writes from below Python, as C++ does, and then gives up in one way or another.
TALKATIVE = """
import os
os.write(2, b"so many words " + os.environ["TF_CPP_MIN_LOG_LEVEL"].encode() + b"\\n")
{end}
"""
READER = """
class train:
    def load_checkpoint(prefix):
        os.write(2, b"a message of its own ")
        raise RuntimeError("cannot be read")
"""


@pytest.mark.parametrize(
    ("end", "error", "complaint"),
    [
        (READER, "gpt_xp.errors.CheckpointError", "cannot be read"),
        ("raise ImportError('DLL load failed')", "ImportError", "DLL load failed"),
        ("import a_module_that_lacks", "ModuleNotFoundError", "a_module_that_lacks"),
    ],
)
def test_the_chatter_of_the_import_is_not_shown_and_errors_are(folder, tmp_path, end, error, complaint):
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "tensorflow.py").write_text(TALKATIVE.format(end=end))
    done = run_python(CONVERT.format(folder=str(folder)), tmp_path / "fakes")
    assert done.returncode == 1
    assert "so many words" not in done.stderr
    assert "after unset" in done.stderr
    assert ("a message of its own" in done.stderr) == (end == READER)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{error}: ")
    assert complaint in last
    assert listing(folder) == OPENAI_FILES


def test_who_has_chosen_what_tensorflow_says_hears_it(folder, tmp_path):
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "tensorflow.py").write_text(TALKATIVE.format(end=READER))
    done = run_python(CONVERT.format(folder=str(folder)), tmp_path / "fakes", TF_CPP_MIN_LOG_LEVEL="1")
    assert done.stderr.startswith("so many words 1\na message of its own after 1")


# --- with TensorFlow itself -------------------------------------------------------------------------------------------


@pytest.fixture
def save_tensorflow():
    pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install -e '.[dev,oracle]'")
    from make_openai import save_tensorflow

    return save_tensorflow


@pytest.fixture
def golden(tmp_path, save_tensorflow):
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


oracle = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # warnings of TensorFlow about itself


def with_oracle(test):
    for mark in oracle:
        test = mark(test)
    return test


def naive_logits(params, tokens):
    return naive_gpt2(tokens, **params, n_head=CONFIG.n_head)


@with_oracle
def test_what_tensorflow_wrote_is_converted_bit_for_bit(golden):
    assert_same(converted(golden), make_tensors(), np.float32)
    assert read_config(golden) == CONFIG
    convert(golden)


@with_oracle
def test_the_logits_are_those_of_a_naive_forward_pass(golden):
    params = converted(golden)
    tokens = [200, 0, 262, 17, 17, 99, 130, 5, 261, 64, 1]
    model = Model(params, CONFIG, Tokenizer.from_directory(golden), "numpy")
    expected = naive_logits(nested(make_tensors()), tokens)
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float32"])


@with_oracle
def test_both_formats_of_one_model_become_equal_bits(tmp_path, save_tensorflow):
    tensors = make_tensors(seed=3)
    theirs = write_texts(tmp_path / "openai")
    save_tensorflow(theirs, variables(tensors))
    hub = tmp_path / "hub"
    hub.mkdir()
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 11, 11), np.float32) for i in range(CONFIG.n_layer)}
    (hub / "downloaded").write_bytes(file_bytes(masks | tensors, header_length=PUBLISHED_HEADER))
    align_weights(hub / "downloaded", hub / WEIGHTS)
    a, b = converted(theirs), read_params(hub, CONFIG, None)
    assert_same(a, tensors)
    assert_same(b, tensors)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@with_oracle
def test_what_gpt_2_simple_leaves_is_converted_and_again_when_training_goes_on(tmp_path, save_tensorflow):
    directory = write_texts(tmp_path / "run 1] {and} ü")
    for step in (900, 1000):
        found = variables(make_tensors(seed=step))
        slots = {f"{name}/Adam": np.zeros_like(array) for name, array in found.items()}
        save_tensorflow(directory, found | slots | {"global_step": np.int64(step)}, "model", step)
        assert_same(converted(directory), make_tensors(seed=step))
    assert (directory / "model-900.index").exists()
    for name in ("checkpoint", "model-900.index", WEIGHTS):
        (directory / name).unlink()
    assert_same(converted(directory), make_tensors(seed=1000))


@with_oracle
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_kept_and_other_numbers_refused(tmp_path, save_tensorflow, dtype):
    tensors = make_tensors(dtype=dtype)
    save_tensorflow(write_texts(tmp_path), variables(tensors))
    assert_same(converted(tmp_path), tensors)
    tensors["wpe.weight"] = tensors["wpe.weight"].astype(np.int32)
    save_tensorflow(tmp_path, variables(tensors))
    with pytest.raises(CheckpointError, match="model/wpe is int32 instead of one of float16, float32, float64"):
        convert(tmp_path)


@with_oracle
def test_bfloat16_of_tensorflow_is_converted_bit_for_bit(tmp_path, save_tensorflow):
    rounded, widened = as_bfloat16(make_tensors())
    save_tensorflow(write_texts(tmp_path), variables(rounded), "model", 1000)
    (tmp_path / "checkpoint").unlink()
    assert_same(converted(tmp_path), widened, np.float32)


@with_oracle
@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_damage_is_one_clear_error(golden, name, damage):
    path = golden / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": whole[:-1000], "changed": changed}[damage])
    with pytest.raises(CheckpointError, match=r"model\.ckpt.*fetch or copy all of its files") as caught:
        convert(golden)
    assert "\n" not in str(caught.value)
    assert not (golden / WEIGHTS).exists()
    assert not list(golden.glob("*.part"))


@with_oracle
def test_transformers_reads_what_is_converted_to_equal_logits(golden):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev,oracle]'")
    from transformers import GPT2LMHeadModel

    convert(golden)
    model, report = GPT2LMHeadModel.from_pretrained(golden, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values())
    tokens = [200, 0, 262, 17, 99]
    with torch.inference_mode():
        theirs = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    assert_values(theirs, naive_logits(nested(make_tensors()), tokens), TOLERANCE["logits", "float64"])


@with_oracle
def test_a_conversion_says_nothing(golden):
    done = run_python(CONVERT.format(folder=str(golden)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "after unset")
    assert (golden / WEIGHTS).exists()
