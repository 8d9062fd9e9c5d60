"""Checkpoints made by hand for tests: the bytes of safetensors files, right and wrong, without the library.

The names are written out here on purpose, independent of those in `gpt_xp.checkpoint.tensors`.
"""

import json
import os

import numpy as np
from hypothesis import HealthCheck

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError

# Sizes are odd and distinct, so that swapped axes are found.
CONFIG = GPT2Config(n_vocab=101, n_ctx=37, n_embd=39, n_head=3, n_layer=2, eos_token_id=5, bos_token_id=3)
TINY = GPT2Config(n_vocab=7, n_ctx=5, n_embd=3, n_head=1, n_layer=1, eos_token_id=None)

CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "uint16": "BF16", "int32": "I32", "bool": "BOOL"}
PUBLISHED_HEADER = 14283  # bytes of the header of the published gpt2; its data begins at 14291, which is misaligned


def shapes(config):
    n = config.n_embd
    table = {"wte.weight": (config.n_vocab, n), "wpe.weight": (config.n_ctx, n)}
    for i in range(config.n_layer):
        table |= {
            f"h.{i}.ln_1.weight": (n,),
            f"h.{i}.ln_1.bias": (n,),
            f"h.{i}.attn.c_attn.weight": (n, 3 * n),
            f"h.{i}.attn.c_attn.bias": (3 * n,),
            f"h.{i}.attn.c_proj.weight": (n, n),
            f"h.{i}.attn.c_proj.bias": (n,),
            f"h.{i}.ln_2.weight": (n,),
            f"h.{i}.ln_2.bias": (n,),
            f"h.{i}.mlp.c_fc.weight": (n, 4 * n),
            f"h.{i}.mlp.c_fc.bias": (4 * n,),
            f"h.{i}.mlp.c_proj.weight": (4 * n, n),
            f"h.{i}.mlp.c_proj.bias": (n,),
        }
    return table | {"ln_f.weight": (n,), "ln_f.bias": (n,)}


def make_tensors(config, dtype="float32", seed=0):
    """Return every tensor of a GPT-2 by its name without prefix; all values differ."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes(config).items()}


def nested(tensors):
    """Return the params that the tensors should become."""

    def affine(name, weight):
        return {weight: tensors[f"{name}.weight"], "b": tensors[f"{name}.bias"]}

    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    return {
        "wte": tensors["wte.weight"],
        "wpe": tensors["wpe.weight"],
        "blocks": [
            {
                "ln_1": affine(f"h.{i}.ln_1", "g"),
                "attn": {
                    "c_attn": affine(f"h.{i}.attn.c_attn", "w"),
                    "c_proj": affine(f"h.{i}.attn.c_proj", "w"),
                },
                "ln_2": affine(f"h.{i}.ln_2", "g"),
                "mlp": {"c_fc": affine(f"h.{i}.mlp.c_fc", "w"), "c_proj": affine(f"h.{i}.mlp.c_proj", "w")},
            }
            for i in range(n_layer)
        ],
        "ln_f": affine("ln_f", "g"),
    }


def leaves(tree):
    """Return the arrays of params, in a fixed order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, list):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [tree]


def assert_same(params, tensors, dtype=None):
    """Check for equal bits, dtypes (or `dtype`), shapes and structure."""

    def structure(tree):
        if isinstance(tree, dict):
            return {key: structure(branch) for key, branch in tree.items()}
        return [structure(branch) for branch in tree] if isinstance(tree, list) else None

    expected = nested(tensors)
    assert structure(params) == structure(expected)
    for actual, wanted in zip(leaves(params), leaves(expected), strict=True):
        assert type(actual) is np.ndarray
        assert actual.dtype == (dtype or wanted.dtype)
        assert actual.shape == wanted.shape
        assert actual.tobytes() == wanted.astype(actual.dtype).tobytes()


def header_of(tensors):
    """Return the entries of a safetensors header for contiguous tensors; uint16 stands for bfloat16."""
    header, end = {}, 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": CODES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    return header


def file_bytes(tensors, header=None, header_length=None):
    """Return a safetensors file. `header` (entries, or bytes) replaces the right one; it is padded by spaces."""
    header = header_of(tensors) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(header_length or -(-len(text) // 8) * 8)
    assert header_length in (None, len(text))
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


def config_entries(config, **changes):
    """Return the relevant entries of a config.json of transformers. A change to None is written as null."""
    return {
        "activation_function": "gelu_new",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_positions": config.n_ctx,
        "vocab_size": config.n_vocab,
    } | changes


def write_checkpoint(directory, tensors, config=CONFIG, **options):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_entries(config)))
    (directory / "model.safetensors").write_bytes(file_bytes(tensors, **options))
    return directory


WEIGHTS = "model.safetensors"
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def prefixed(tensors):
    return {f"transformer.{name}": array for name, array in tensors.items()}


def only_the_head(tensors):
    """Return the tensors that safetensors.torch.save_model writes: only the first of two names of a matrix."""
    return {{"wte.weight": "lm_head.weight"}.get(name, f"transformer.{name}"): tensors[name] for name in tensors}


def write_shards(directory, parts, weight_map=None):
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for shard, tensors in zip(names, parts, strict=True):
        (directory / shard).write_bytes(file_bytes(tensors))
    found = {name: shard for shard, tensors in zip(names, parts, strict=True) for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": found if weight_map is None else weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return names, found


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 548105171\n"


def config_of(directory, **changes):
    (directory / "config.json").write_text(json.dumps(config_entries(CONFIG, **changes)))
    return read_config(directory)


class TwoFiles:
    """A tokenizer that can only be saved."""

    def check_place(self, directory):
        if os.path.exists(os.path.join(directory, "tokenizer.json")):
            raise CheckpointError("another tokenizer")

    def save(self, directory):
        for name in ("vocab.json", "merges.txt"):
            with open(os.path.join(directory, name), "w") as file:
                file.write(name)


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}
