"""OpenAI's layout made by hand for tests: names, shapes and texts, independent of gpt-xp and TensorFlow."""

import json

import numpy as np
import pytest
from checkpoint_files import shapes
from folders import GOLDEN_FILES

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.openai import convert
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError

# n_vocab is 256 bytes, 6 merges and <|endoftext|>. Sizes are odd and distinct, so that swapped axes are found.
CONFIG = GPT2Config(n_vocab=263, n_ctx=11, n_embd=15, n_head=3, n_layer=2, eos_token_id=262, bos_token_id=262)
MERGES = ["t h", "th e", "Ġ the", "i n", "e r", "Ġ a"]


def make_tensors(config=CONFIG, seed=0, dtype="float32"):
    """Return every tensor by the Hub's name without prefix; the numbers are the same in every version of NumPy."""
    random = np.random.RandomState(seed)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes(config).items()}


def variables(tensors):
    """Return the same tensors by OpenAI's names; linear layers are convolutions of width 1: [1, n_in, n_out]."""
    found = {"model/wte": tensors["wte.weight"], "model/wpe": tensors["wpe.weight"]}
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    norms = {"model/ln_f": "ln_f"}
    linears = {}
    for i in range(n_layer):
        norms |= {f"model/h{i}/{ln}": f"h.{i}.{ln}" for ln in ("ln_1", "ln_2")}
        linears |= {f"model/h{i}/attn/{c}": f"h.{i}.attn.{c}" for c in ("c_attn", "c_proj")}
        linears |= {f"model/h{i}/mlp/{c}": f"h.{i}.mlp.{c}" for c in ("c_fc", "c_proj")}
    for theirs, ours in norms.items():
        found |= {f"{theirs}/g": tensors[f"{ours}.weight"], f"{theirs}/b": tensors[f"{ours}.bias"]}
    for theirs, ours in linears.items():
        found |= {f"{theirs}/w": tensors[f"{ours}.weight"][None], f"{theirs}/b": tensors[f"{ours}.bias"]}
    return found


def write_texts(directory, config=CONFIG):
    """Write hparams.json, encoder.json and vocab.bpe in OpenAI's layout."""
    directory.mkdir(exist_ok=True)
    sizes = {name: getattr(config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    (directory / "hparams.json").write_text(json.dumps(sizes, indent=2) + "\n")
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    (directory / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return directory


class FakeReader:
    """A reader with the interface of TensorFlow's, for variables in memory. NumPy's dtype names equal TensorFlow's."""

    def __init__(self, found):
        self.found = found

    def get_variable_to_shape_map(self):
        return {name: list(array.shape) for name, array in self.found.items()}

    def get_variable_to_dtype_map(self):
        return {name: array.dtype for name, array in self.found.items()}

    def get_tensor(self, name):
        return self.found[name].copy()


GOLDEN = GOLDEN_FILES / "openai"
OPENAI_FILES = ["checkpoint", "encoder.json", "hparams.json", "model.ckpt.index", "vocab.bpe"]


def converted(directory, dtype=None):
    convert(directory)
    return read_params(directory, read_config(directory), dtype)


def as_bfloat16(tensors):
    """Return the same tensors in bfloat16, and the rounded values in float32."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; it comes with JAX")

    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    return rounded, {name: array.astype(np.float32) for name, array in rounded.items()}


def no_tensorflow():
    raise CheckpointError("TensorFlow was wanted")
