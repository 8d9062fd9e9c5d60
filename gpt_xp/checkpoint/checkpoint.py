"""Read and save a model's directory, in the layout that transformers writes and the Hub serves.

A directory holds `config.json`, the weights (see `weights`) and the files of a tokenizer.
"""

import os
from dataclasses import dataclass
from typing import Protocol

from safetensors import SafetensorError

from gpt_xp.atomic_files import write_json, written_together
from gpt_xp.checked_files import exists
from gpt_xp.checkpoint.carried import CONFIG, GENERATION_CONFIG, Carried
from gpt_xp.checkpoint.config_json import config_entries, config_of, is_tied, read_carried, stated_quantization
from gpt_xp.checkpoint.tensors import named_arrays
from gpt_xp.checkpoint.weights import WEIGHTS, read_params, write_weights
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError
from gpt_xp.quantization import quantization_of
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.types import Params


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a model's directory.

    `params` are read-only NumPy arrays (see `weights.read_params`). `quantization` is "int8", "int4" or None.
    `carried` has the entries and files that `save` writes again.
    """

    config: GPT2Config
    params: Params
    quantization: str | None
    tokenizer: Tokenizer
    carried: Carried


def read(directory: str | os.PathLike[str], dtype: str | None = None, *, aligned: bool = True) -> Checkpoint:
    """Return the model in a directory, with its params in `dtype`, and `aligned` or not (see `weights.read_params`).

    Quantized params stay as they are stored.
    Raises `ModelNotFoundError`, `CheckpointError`, `ConfigError`, `TokenizerError`, `BackendError` for another dtype,
    and `DeviceMemoryError`.
    """
    carried = read_carried(directory)
    config, quantization = config_of(carried), stated_quantization(carried)
    tokenizer = Tokenizer.from_directory(directory)  # Its errors come before the large weights are read.
    params = read_params(directory, config, dtype, quantization, is_tied=is_tied(carried.config), aligned=aligned)
    return Checkpoint(config, params, quantization, tokenizer, carried)


class SavedTokenizer(Protocol):
    """The part of a tokenizer that `save` needs."""

    def check_place(self, directory: str | os.PathLike[str]) -> object:
        """Raise `CheckpointError` where files in `directory` would be read in place of those that `save` writes."""

    def save(self, directory: str) -> object:
        """Write the tokenizer's files into an existing directory."""


def save(
    directory: str | os.PathLike[str],
    params: Params,
    config: GPT2Config,
    tokenizer: SavedTokenizer | None = None,
    carried: Carried | None = None,
) -> None:
    """Write params (NumPy arrays of float16, float32 or float64), config and tokenizer as transformers would.

    `carried` has the entries and files of the checkpoint that they come from, which are written again. The directory is
    made if it does not exist. All files are written under temporary names and then renamed. So a failure leaves an old
    checkpoint whole, and arrays mapped from it do not change. (Windows refuses to replace a mapped file.)

    Raises `CheckpointError` where params and config do not fit, before anything is written, and where writing fails.
    It is also raised where the directory has the `tokenizer.json` of another tokenizer, which would be read instead.
    """
    tensors = named_arrays(params, config)
    stated, generation = ({}, {}) if carried is None else (carried.config, carried.generation)
    dtype = str(tensors["transformer.wpe.weight"].dtype)
    entries, generation = config_entries(config, dtype, quantization_of(params), stated, generation)
    try:
        # The weights are moved first, because Windows refuses to replace them while they are mapped.
        with written_together(directory, first=WEIGHTS) as aside:
            if tokenizer is not None:
                tokenizer.check_place(directory)
                tokenizer.save(aside)
            write_json(os.path.join(aside, CONFIG), entries)
            # The file of an older model must not stay.
            if generation or exists(os.path.join(directory, GENERATION_CONFIG)):
                write_json(os.path.join(aside, GENERATION_CONFIG), generation)
            if carried is not None:
                carried.copy_files(aside, directory)
            write_weights(os.path.join(aside, WEIGHTS), tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save to {directory} ({error}); every file that was there is still whole. Check the space and the "
            f"permissions, or save to another directory"
        ) from error
