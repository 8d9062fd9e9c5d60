"""Convert `config.json` and `generation_config.json` to a GPT2Config and back, for models that are a GPT-2."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_xp.checked_files import exists, read_json, reading
from gpt_xp.checkpoint.carried import CONFIG, GENERATION_CONFIG, Carried
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError
from gpt_xp.quantization import STORED_KINDS

# These entries of config.json change the mathematics. Each has the values that GPT-2 may have, the default first.
_MATHEMATICS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # Both names mean the same formula.
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),  # If false, `weights.read_params` compares the matrices.
}
_ROLES = ("eos_token_id", "bos_token_id")
_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_MAX_SIZE = 2**31 - 1  # Token ids and positions are int32.


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(directory: str | os.PathLike[str]) -> GPT2Config:
    """Return the config that a directory states. Raises as `read_carried` and `config_of` do."""
    return config_of(read_carried(directory))


def read_carried(directory: str | os.PathLike[str]) -> Carried:
    """Return all entries of a directory's `config.json` and `generation_config.json`.

    Raises `ModelNotFoundError` where there is no such directory, and `CheckpointError` where a file is missing,
    unreadable or malformed.
    """
    path, generation = os.path.join(directory, CONFIG), os.path.join(directory, GENERATION_CONFIG)
    with reading(directory):
        if not exists(path):
            if exists(os.path.join(directory, "adapter_config.json")):
                raise CheckpointError(
                    f"{directory} has an adapter (PEFT), and not the model that it belongs to: merge the two with "
                    f"merge_and_unload(), and save the result with save_pretrained"
                )
            raise CheckpointError(
                f"{directory} has no config.json: a checkpoint is a directory with config.json and model.safetensors, "
                f"as transformers' save_pretrained writes it"
            )
        return Carried(Path(directory), read_json(path), read_json(generation) if exists(generation) else {})


def config_of(carried: Carried) -> GPT2Config:
    """Return the config that the entries of a checkpoint describe.

    An entry that is absent has transformers' default. `generation_config.json` names the tokens that end and begin a
    text, or else `config.json`. An id outside the vocabulary is left out, because no model can choose it. Raises
    `ConfigError`, which names the file, where the entries are not GPT-2's mathematics.
    """
    with _named(carried.directory / GENERATION_CONFIG):
        _check_roles(carried.generation)
    with _named(carried.directory / CONFIG):
        entries = carried.config
        _check_model_type(entries)
        _check_roles(entries)
        for key, allowed in _MATHEMATICS.items():
            _require(key, entries.get(key, allowed[0]), allowed)
        n_vocab = size_in(entries, "vocab_size")
        n_embd = size_in(entries, "n_embd")
        _require("n_inner", entries.get("n_inner"), (None, 4 * n_embd))
        return GPT2Config(
            n_vocab=n_vocab,
            n_ctx=size_in(entries, "n_ctx" if "n_ctx" in entries and "n_positions" not in entries else "n_positions"),
            n_embd=n_embd,
            n_head=size_in(entries, "n_head"),
            n_layer=size_in(entries, "n_layer"),
            **_roles_from(entries, carried.generation, n_vocab),
        )


def stated_quantization(carried: Carried) -> str | None:
    """Return how the weights of a checkpoint are quantized, by its entries: "int8", "int4", or None.

    Raises `ConfigError`, which names the file, for a quantization that is not gpt-xp's.
    """
    if (found := carried.config.get("quantization_config")) is None:
        return None
    with _named(carried.directory / CONFIG):
        if found not in (_quantization_entry(kind) for kind in STORED_KINDS):
            raise ConfigError(
                f"quantization_config is {json.dumps(found):.80}, which gpt-xp cannot read; take the model that was "
                f"quantized, and quantize it by gpt-xp"
            )
    return str(found["weights"])


def is_tied(entries: dict[str, Any]) -> bool:
    """Return whether embedding and head are one matrix, according to `config.json`."""
    return entries.get("tie_word_embeddings") is not False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let a `ConfigError` name the file that has the entries."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _roles_from(entries: dict[str, Any], generation: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return `eos_token_id` and `bos_token_id` as `GPT2Config` has them, by the first source that names them.

    Ids outside the vocabulary are left out, because no model can choose them.
    """
    found: dict[str, Any] = {}
    for key in _ROLES:
        ids = next((named for source in (generation, entries) if (named := _ids(source.get(key)))), [])
        known = [i for i in ids if 0 <= i < n_vocab]
        found[key] = None if not known else known[0] if len(known) == 1 or key == "bos_token_id" else tuple(known)
    return found


def _check_roles(entries: dict[str, Any]) -> None:
    """Raise `ConfigError` where `eos_token_id` or `bos_token_id` is neither a token id, a list of them, nor null."""
    for key in _ROLES:
        if any(type(i) is not int for i in _ids(entries.get(key))):
            shown = json.dumps(entries[key])
            raise ConfigError(f"{key} is {shown:.80}; a token id, a list of them or null was expected")


def _ids(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [] if entry is None else [entry]


def _check_model_type(entries: dict[str, Any]) -> None:
    if (model_type := entries.get("model_type")) == "gpt2":
        return
    if model_type is None and entries.keys() >= {"n_embd", "n_head", "n_layer"}:
        raise ConfigError(
            'model_type is missing, and the sizes have GPT-2\'s names; if this is a GPT-2, add the line "model_type": '
            '"gpt2",'
        )
    raise ConfigError(f"model_type is {model_type!r:.80}; only 'gpt2' can be loaded: take the directory of a GPT-2")


def _require(key: str, value: object, allowed: tuple[Any, ...]) -> None:
    # Types are compared too, because 1 == True in Python.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = " or ".join(json.dumps(choice) for choice in allowed)
        raise ConfigError(
            f"{key} is {json.dumps(value):.80}, and GPT-2 as OpenAI published it, the one model that gpt-xp computes, "
            f"has {choices}; take another checkpoint"
        )


def size_in(entries: dict[str, Any], key: str) -> int:
    """Return one of the sizes among the entries. Raises `ConfigError` where it is missing or impossible."""
    if key not in entries:
        raise ConfigError(f"{key} is missing; a whole number from 1 to {_MAX_SIZE} was expected: fetch the file again")
    value = entries[key]
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise ConfigError(
            f"{key} is {json.dumps(value):.80}; a whole number from 1 to {_MAX_SIZE} was expected: correct it, or "
            f"fetch the file again"
        )
    return value


# --- writing ----------------------------------------------------------------------------------------------------------


def config_entries(
    config: GPT2Config,
    dtype: str,
    quantization: str | None = None,
    stated: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of `config.json` and of `generation_config.json` for a model to be saved.

    `stated` and `generation` are the entries of the checkpoint that the model came from. They are kept, except where
    the config says something else. Entries that are left out have the same defaults in transformers.
    """
    stated, generation = stated or {}, generation or {}
    entries: dict[str, Any] = {
        "n_inner": None,
        **dict.fromkeys(_DROPOUT, 0.1),
        "initializer_range": 0.02,
        "use_cache": True,
    }
    entries |= {key: value for key, value in stated.items() if key not in ("torch_dtype", "quantization_config")}
    entries |= {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.n_vocab,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,  # Other programs still read this old name.
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        **{key: allowed[0] for key, allowed in _MATHEMATICS.items()},
        "dtype": dtype,
    }
    if quantization is not None:
        entries["quantization_config"] = _quantization_entry(quantization)
    roles = {"eos_token_id": config.eos_token_id, "bos_token_id": config.bos_token_id}
    if not stated or roles != _roles_from(stated, generation, config.n_vocab):
        first = next(iter(config.end_tokens), None) if config.bos_token_id is None else config.bos_token_id
        entries |= roles | {"bos_token_id": first}
        generation = {key: value for key, value in generation.items() if key not in _ROLES}
    return entries, generation


def _quantization_entry(kind: str) -> dict[str, str]:
    """Return the `quantization_config` for that kind. transformers refuses it, because it knows no such method."""
    return {"quant_method": "gpt-xp", "weights": kind}
