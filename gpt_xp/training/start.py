"""What a run begins with: a tokenizer, a config, and params, from a trained model or from random numbers."""

import math

import numpy as np

from gpt_xp import checkpoint
from gpt_xp._typing import Params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.hub import find_model
from gpt_xp.safetensors_file import NumpyArray
from gpt_xp.tokenizer import EOS, Tokenizer
from gpt_xp.tokenizer_training import check_vocab_size, train_tokenizer
from gpt_xp.training.corpus import Advance, Span, n_bytes, texts
from gpt_xp.training.settings import VOCAB_SIZE, Settings

STD = 0.02  # of all matrices; openai/gpt-2 `src/model.py`
STD_WPE = 0.01


def check_start(settings: Settings) -> None:
    """Raise, before any text is read, where text, model or tokenizer are missing or do not fit the settings."""
    n_bytes(settings)
    config = find_config(settings, None)
    settings.length(config)
    if settings.start is None and settings.tokenizer is None:
        check_vocab_size(settings.vocab_size or VOCAB_SIZE, (EOS,))
        return
    tokenizer = find_tokenizer(settings, Span(()))
    if settings.start is not None and tokenizer.n_vocab > config.n_vocab:
        raise SettingError(
            f"the tokenizer of {settings.start} has ids up to {tokenizer.n_vocab - 1}, and its model's vocabulary ends "
            f"at {config.n_vocab - 1}: they belong to different models"
        )


def find_tokenizer(settings: Settings, train_span: Span, advance: Advance | None = None) -> Tokenizer:
    """Return the tokenizer of a model or directory, where one is named, or a new one, trained on the training text."""
    source = settings.tokenizer if settings.start is None else settings.start
    if source is not None:
        return Tokenizer.from_directory(find_model(source))
    return train_tokenizer(texts(train_span, advance), settings.vocab_size or VOCAB_SIZE)


def find_config(settings: Settings, tokenizer: Tokenizer | None) -> GPT2Config:
    """Return the config of the model to start from, or of the one to make; without a tokenizer, that of some other."""
    if settings.start is None:
        if tokenizer is None:
            return settings.shape(1)
        return settings.shape(tokenizer.n_vocab, tokenizer.eos_token_id, tokenizer.bos_token_id)
    directory = find_model(settings.start)
    config = checkpoint.read_config(directory)
    if settings.freeze > config.n_layer:
        raise SettingError(f"freeze {settings.freeze}: the model has {config.n_layer} blocks")
    if (kind := checkpoint.read_quantization(directory)) is not None:
        raise SettingError(f"{settings.start} is quantized ({kind}), which cannot be trained: start from the original")
    return config


def first_params(settings: Settings, config: GPT2Config) -> Params:
    """Return the params before the first step, NumPy arrays of float32."""
    if settings.start is not None:
        return checkpoint.read_params(find_model(settings.start), config)
    return random_params(config, settings.seed)


def random_params(config: GPT2Config, seed: int) -> Params:
    """Return new params, NumPy arrays of float32, by GPT-2's initialization; the same for the same seed.

    Normal with a deviation of 0.02 (0.01 for positions), and in the layers that add to the residual stream smaller by
    the square root of their number (Radford et al. 2019, section 2.3).
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
