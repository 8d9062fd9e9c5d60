"""Convert OpenAI's files with TensorFlow, once, to the layout that `checkpoint` reads.

A directory holds `hparams.json`, `encoder.json`, `vocab.bpe` and a TensorFlow checkpoint: `model.ckpt.index`,
`model.ckpt.data-00000-of-00001`, and `checkpoint`, a text that names it. OpenAI published GPT-2 in this layout
(openai/gpt-2 `download_model.py`). gpt-2-simple writes fine-tuned models in it, with names such as `model-1000`.
"""

import glob
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gpt_xp.atomic_files import sync, write_json, written_aside
from gpt_xp.checked_files import exists, open_regular, read_json, reading
from gpt_xp.checkpoint.config_json import config_entries, read_config, size_in
from gpt_xp.checkpoint.safetensors_file import n_bytes, open_safetensors, write_safetensors
from gpt_xp.checkpoint.tensors import PREFIX, check_tensors, tensor_shapes
from gpt_xp.checkpoint.weights import WEIGHTS
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError
from gpt_xp.installation import install_command
from gpt_xp.tokenizer.words import EOS
from gpt_xp.types import NumpyArray

_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_SAFETENSORS_NAME = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
_DTYPE_OF_NAME = {name: dtype for dtype, name in _SAFETENSORS_NAME.items()}
OPENAI_NAME, _INDEX = "model.ckpt", ".index"
_NAME = re.compile(r'model_checkpoint_path\s*:\s*"([^"\n\0]*)"')  # It skips all_model_checkpoint_paths.
# The most bytes to read of the file `checkpoint`. It has about a hundred bytes, or a line for each kept step.
_MAX_TEXT = 1_000_000
_FIX = "copy its directory to a place where you may write, and load that"

# This entry in the header of a converted file says which checkpoint it was made from. The index holds the checksums of
# all tensors, so another index means other weights.
_MADE_FROM = "gpt_xp.made_from_index_sha256"


def is_openai_layout(directory: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds `hparams.json` and the index of a TensorFlow checkpoint."""
    return os.path.exists(os.path.join(directory, "hparams.json")) and has_index(directory)


def has_index(directory: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds the index of a TensorFlow checkpoint."""
    try:
        names = os.listdir(directory)
    except (OSError, ValueError):  # The directory is absent or unreadable, or its name holds a NUL.
        return False
    return any(name.endswith(_INDEX) for name in names)


def read_hparams(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Return the sizes in a directory's `hparams.json`: n_vocab, n_ctx, n_embd, n_head, n_layer.

    Other entries are ignored. Raises `ModelNotFoundError` where there is no such directory, and `CheckpointError`
    where the file is missing, unreadable or malformed. Raises `ConfigError` for impossible sizes.
    """
    path = os.path.join(directory, "hparams.json")
    with reading(directory):
        if not exists(path):
            raise CheckpointError(f"{directory} has no hparams.json, which lies beside OpenAI's checkpoints; fetch it")
        entries = read_json(path)
    try:
        sizes = {name: size_in(entries, name) for name in _SIZES}
        GPT2Config(**sizes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return sizes


def has_tensorflow() -> bool:
    """Return whether TensorFlow is installed. It is not imported."""
    return importlib.util.find_spec("tensorflow") is not None


def check_tensorflow() -> None:
    """Raise `CheckpointError`, with the pip command to run, where TensorFlow is not installed.

    TensorFlow is not imported.
    """
    if not has_tensorflow():
        newest = " (with Python 3.13 or older)" if sys.version_info >= (3, 14) else ""
        raise CheckpointError(
            f"OpenAI's own checkpoints are read by TensorFlow, once each, and it is not installed: "
            f"{install_command('tensorflow')}{newest}. The Hub has the same weights in files that need no TensorFlow: "
            f"gpt-xp models pull NAME"
        )


def convert(directory: str | os.PathLike[str]) -> None:
    """Make `model.safetensors` and `config.json` from OpenAI's files, beside them, unless they are up to date.

    Afterwards the directory can be read as any other. Tensors have the dtype that they are stored in, and the names
    that transformers gives them. Only one tensor at a time is in memory. Each file is written under a temporary name
    and then renamed, the weights first. So a conversion that was stopped is repeated the next time. Two conversions at
    once do no harm. A `model.safetensors` that gpt-xp did not make stays.
    A `config.json` of the same sizes stays too.

    Raises `ModelNotFoundError` where there is no such directory, and `ConfigError` for a model that is not GPT-2.
    Raises `CheckpointError` where files are missing, damaged or unreadable, do not fit each other, or cannot be
    written. It is also raised where TensorFlow is needed and not installed.
    """
    weights, config_json = os.path.join(directory, WEIGHTS), os.path.join(directory, "config.json")
    with reading(directory):
        there = exists(weights)
        made_from = _made_from(weights) if there else None
        if exists(f"{weights}.index.json") or (there and made_from is None):
            return  # The user put the file there.
        config = GPT2Config(**read_hparams(directory))
        if exists(config_json):
            _check_config(directory, config)
        prefix = _prefix(directory)
        index = _sha256(f"{prefix}{_INDEX}")
        if made_from != index:
            check_tensorflow()
            _convert_weights(prefix, weights, config, {"format": "pt", _MADE_FROM: index})
        if not exists(config_json):
            _write_config(directory, config, weights)


# --- the files beside the tensors -------------------------------------------------------------------------------------


def _made_from(weights: str) -> str | None:
    with open_safetensors(weights) as file:
        return file.metadata.get(_MADE_FROM)


def _prefix(directory: str | os.PathLike[str]) -> str:
    """Return the path of the checkpoint's files, in this directory, without their endings."""
    there = sorted(name for file in os.listdir(directory) if (name := file.removesuffix(_INDEX)) not in ("", file))
    name = _chosen(directory) or _only(directory, there)
    prefix = os.path.abspath(os.path.join(directory, name))  # TensorFlow would take gs://... for an address.
    if not exists(f"{prefix}{_INDEX}"):
        others = f", or name one that is there in its file `checkpoint`: {', '.join(there)}" if there else ""
        raise CheckpointError(
            f"{directory} has no {name}{_INDEX}, of the TensorFlow checkpoint {name}; fetch or copy all of its files"
            f"{others}"
        )
    return prefix


def _chosen(directory: str | os.PathLike[str]) -> str | None:
    """Return the name of the checkpoint that the file `checkpoint` gives; None where there is no file or no name."""
    text = os.path.join(directory, "checkpoint")
    if not exists(text):
        return None
    with open_regular(text) as file:
        found = _NAME.search(file.read(_MAX_TEXT).decode("utf-8", "replace"))
    # The path says where the checkpoint was first saved, perhaps on another system. Only its last part is used.
    return (re.split(r"[/\\]", found[1])[-1] or None) if found else None


def _only(directory: str | os.PathLike[str], there: list[str]) -> str:
    """Return the name that OpenAI gave, or the only one there is. Raises `CheckpointError` for a choice of several."""
    if OPENAI_NAME in there or not there:
        return OPENAI_NAME
    if len(there) > 1:
        raise CheckpointError(
            f"{directory} has several TensorFlow checkpoints and no file `checkpoint` that names one of them; write "
            f'this line into it: model_checkpoint_path: "NAME", where NAME is one of: {", ".join(there)}'
        )
    return there[0]


def _sha256(path: str) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_config(directory: str | os.PathLike[str], config: GPT2Config) -> None:
    there, wanted = asdict(read_config(directory)), asdict(config)
    faults = [f"{name} {there[name]} instead of {wanted[name]}" for name in _SIZES if there[name] != wanted[name]]
    if faults:
        raise CheckpointError(
            f"{directory} has a config.json that contradicts hparams.json: {', '.join(faults)}. Remove config.json, "
            f"which is made anew, or fetch the hparams.json of this model"
        )


def _write_config(directory: str | os.PathLike[str], config: GPT2Config, weights: str) -> None:
    with open_safetensors(weights) as file:
        dtype = _DTYPE_OF_NAME[file.tensors[f"{PREFIX}wte.weight"].dtype]
    entries, _ = config_entries(replace(config, eos_token_id=_end_of_text(directory)), dtype)
    with written_aside(os.path.join(directory, "config.json"), n_bytes=1000, fix=_FIX) as temporary:
        write_json(temporary, entries)
        sync(temporary)


def _end_of_text(directory: str | os.PathLike[str]) -> int | None:
    path = os.path.join(directory, "encoder.json")
    token_id = read_json(path).get(EOS) if exists(path) else None
    return token_id if type(token_id) is int else None


# --- the tensors ------------------------------------------------------------------------------------------------------


def _convert_weights(prefix: str, weights: str, config: GPT2Config, metadata: dict[str, str]) -> None:
    if pattern := re.search(r"[\[*?]", prefix):
        raise CheckpointError(f"TensorFlow takes {prefix} for a pattern, for its {pattern[0]}; rename the directory")
    for data in sorted(glob.glob(f"{prefix}.data-*")):
        with open_regular(data):
            pass  # Opening raises an error unless it is a regular file with its content.
    reader = _open_reader(prefix)
    shapes = reader.get_variable_to_shape_map()
    dtypes = {name: dtype.name for name, dtype in reader.get_variable_to_dtype_map().items()}
    names = tensor_shapes(config, len(shapes))
    variables = {name: _variable(name) for name in names}
    optimizer_prefixes = tuple(f"{variable}/" for variable in variables.values())
    check_tensors(
        f"the variables of {prefix}",
        {
            name: (tuple(shape), dtypes[name])
            for name, shape in shapes.items()
            # An optimizer's variables begin with the name of a variable of the model, or lie outside the model.
            if name.startswith("model/") and not name.startswith(optimizer_prefixes)
        },
        # OpenAI's linear layers are convolutions of width 1. Their [1, n_in, n_out] has the bytes of [n_in, n_out].
        {variables[name]: (1, *shape) if variables[name].endswith("/w") else shape for name, shape in names.items()},
        _SAFETENSORS_NAME,
    )

    def read(full_name: str) -> NumpyArray:
        variable = variables[full_name.removeprefix(PREFIX)]
        with _tensorflow_errors(prefix):
            array = np.ascontiguousarray(reader.get_tensor(variable))
        # bfloat16 is a dtype of another library, for which NumPy has no buffer protocol.
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array

    tensors = {f"{PREFIX}{name}": (_SAFETENSORS_NAME[dtypes[variables[name]]], shape) for name, shape in names.items()}
    with written_aside(weights, sum(n_bytes(*stored) for stored in tensors.values()), fix=_FIX) as temporary:
        write_safetensors(temporary, tensors, read, metadata)


def _variable(name: str) -> str:
    """Return OpenAI's name of a tensor: "h.0.ln_1.weight" -> "model/h0/ln_1/g"."""
    path, _, leaf = name.rpartition(".")
    path = path.replace("h.", "h", 1).replace(".", "/")
    if path in ("wte", "wpe"):
        return f"model/{path}"
    letter = "b" if leaf == "bias" else "g" if "ln_" in path else "w"
    return f"model/{path}/{letter}"


def _open_reader(prefix: str) -> Any:
    """Return TensorFlow's reader of a checkpoint, with the names, shapes, dtypes and arrays of its variables."""
    with _quiet():
        import tensorflow as tf
    with _tensorflow_errors(prefix):
        return tf.train.load_checkpoint(prefix)


@contextmanager
def _tensorflow_errors(prefix: str) -> Iterator[None]:
    """Turn the errors of TensorFlow into `CheckpointError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # TensorFlow raises errors of many types, which have no narrower parent.
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{prefix} is truncated, damaged or no TensorFlow checkpoint ({reason:.200}); fetch or copy all of its "
            f"files again: {os.path.basename(prefix)}.index and .data-00000-of-00001"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TensorFlow's messages at its import off stderr, unless the user has chosen how much is logged."""
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # TensorFlow 2.21 writes some lines before it reads the level. They come from C++, so the file descriptor is used.
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        del os.environ["TF_CPP_MIN_LOG_LEVEL"]
