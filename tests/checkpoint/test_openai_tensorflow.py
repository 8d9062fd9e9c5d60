"""TensorFlow: missing, broken or talkative, and as the writer of what is converted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import PUBLISHED_HEADER, WEIGHTS, assert_same, file_bytes, leaves, listing, nested
from commands import PATIENCE
from comparison import TOLERANCE, assert_values
from naive_gpt2 import gpt2 as naive_gpt2
from openai_files import CONFIG, GOLDEN, OPENAI_FILES, as_bfloat16, converted, make_tensors, variables, write_texts

from gpt_xp import Model, Tokenizer
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.openai import check_tensorflow, convert
from gpt_xp.checkpoint.weights import align_weights, read_params
from gpt_xp.errors import CheckpointError
from gpt_xp.installation import install_command

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
