"""Make what a run begins with: a tokenizer, a config, and params, from a trained model or from random numbers."""

import math
import shutil
from pathlib import Path

import numpy as np

from gpt_xp.atomic_files import write_json, written_aside
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import config_of, read_carried, stated_quantization
from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.hub.find import find_model
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.training import check_vocab_size, train_tokenizer
from gpt_xp.tokenizer.words import EOS
from gpt_xp.training.corpus import COUNTS, Advance, Span, n_bytes, text_of
from gpt_xp.training.settings import VOCAB_SIZE, TrainingSettings
from gpt_xp.training.state import RUN, START, STATE
from gpt_xp.types import NumpyArray, Params

STD = 0.02  # All other matrices have it, as in openai/gpt-2 `src/model.py`.
STD_WPE = 0.01


def check_start(settings: TrainingSettings) -> None:
    """Raise, before any text is read, where text, model or tokenizer are missing or do not fit the settings."""
    n_bytes(settings)
    source = None if settings.source is None else find_model(settings.source)
    config = find_config(settings, None, source)
    settings.row_length(config)
    if source is None:
        check_vocab_size(settings.vocab_size or VOCAB_SIZE, (EOS,))
        return
    Tokenizer.from_directory(source)


def begin_run(folder: Path, settings: TrainingSettings) -> None:
    """Write a copy of the model to start from to `folder`, and then the settings, which mark that the run has begun.

    Raises `SettingError` where its files would replace other work; `CheckpointError` where the copy cannot be made.
    """
    if (folder / STATE).exists():
        raise SettingError(
            f"{folder.parent} holds a run already: go on with it (--resume), train in another directory, or remove it"
        )
    if (folder.parent / "config.json").exists() and not (folder / RUN).exists():
        raise SettingError(f"{folder.parent} holds a model that was not trained there: train in another directory")
    for name in (RUN, COUNTS):  # A former attempt may have left files of other settings.
        (folder / name).unlink(missing_ok=True)
    keep_start(settings, folder / START)
    with written_aside(folder / RUN, 1000) as aside:
        write_json(aside, settings.as_dict())


def keep_start(settings: TrainingSettings, folder: Path) -> None:
    """Copy the model or tokenizer to start from into `folder`, so that the run depends on no other directory.

    A former copy is removed. Raises `CheckpointError` where a file is damaged, or the copy cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if settings.source is None:
        return
    source = find_model(settings.source)
    if settings.start is None:
        Tokenizer.from_directory(source).save(folder)
        return
    found = checkpoint.read(source)
    checkpoint.save(folder, found.params, found.config, found.tokenizer, found.carried)


def kept_start(settings: TrainingSettings, folder: Path) -> Path | None:
    """Return `folder`, to which `keep_start` has copied a model or tokenizer; None where the run began without."""
    if settings.source is None:
        return None
    if not folder.exists():
        raise SettingError(
            f"this run cannot go on: {folder}, a copy of {settings.source} with which it began, is missing. An older "
            f"version of gpt-xp made none; train in another directory"
        )
    return folder


def find_tokenizer(
    settings: TrainingSettings, source: Path | None, train_span: Span, advance: Advance | None = None
) -> Tokenizer:
    """Return the tokenizer in the directory `source`, or else a new one, trained on the training text."""
    if source is not None:
        return Tokenizer.from_directory(source)
    return train_tokenizer(text_of(train_span, advance), settings.vocab_size or VOCAB_SIZE)


def find_config(settings: TrainingSettings, tokenizer: Tokenizer | None, source: Path | None) -> GPT2Config:
    """Return the config of the model to start from, in the directory `source`, or else of a new model.

    Without a tokenizer, the config of a new model has a vocabulary of 1.
    """
    if settings.start is None or source is None:
        if tokenizer is None:
            return settings.new_config(1)
        return settings.new_config(tokenizer.n_vocab, tokenizer.eos_token_id, tokenizer.bos_token_id)
    carried = read_carried(source)
    config = config_of(carried)
    if settings.freeze > config.n_layer:
        raise SettingError(f"freeze {settings.freeze}: the model has {config.n_layer} blocks")
    if (kind := stated_quantization(carried)) is not None:
        raise SettingError(f"{settings.start} is quantized ({kind}), which cannot be trained: start from the original")
    return config


def first_params(settings: TrainingSettings, config: GPT2Config, source: Path | None) -> Params:
    """Return the params before the first step, NumPy arrays of float32; from the directory `source`, or random."""
    if settings.start is None or source is None:
        return random_params(config, settings.seed)
    return checkpoint.read(source, "float32").params


def random_params(config: GPT2Config, seed: int) -> Params:
    """Return new params, NumPy arrays of float32, by GPT-2's initialization; equal seeds give equal params.

    They are normal with a standard deviation of 0.02 (0.01 for positions). In the layers that add to the residual
    stream it is divided by the square root of their number (Radford et al. 2019, section 2.3).
    """
    generator = np.random.Generator(np.random.Philox(seed))
    n_embd = config.n_embd
    std_residual = STD / math.sqrt(2 * config.n_layer)

    def normal(std: float, *shape: int) -> NumpyArray:
        return std * generator.standard_normal(shape, np.float32)

    def linear(n_in: int, n_out: int, std: float = STD) -> Params:
        return {"w": normal(std, n_in, n_out), "b": np.zeros(n_out, np.float32)}

    def norm() -> Params:
        return {"g": np.ones(n_embd, np.float32), "b": np.zeros(n_embd, np.float32)}

    def block() -> Params:
        return {
            "ln_1": norm(),
            "attn": {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd, std_residual)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd, std_residual)},
        }

    return {
        "wte": normal(STD, config.n_vocab, n_embd),
        "wpe": normal(STD_WPE, config.n_ctx, n_embd),
        "blocks": [block() for _ in range(config.n_layer)],
        "ln_f": norm(),
    }
