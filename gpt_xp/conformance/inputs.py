"""The model, the prompts and the timeout of the checks. They are checked here, before a library is imported.

So a fault in them is an error of `conform`, and never a failure of the library.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_xp.checkpoint import checkpoint
from gpt_xp.comparison.job import PROMPTS
from gpt_xp.config import GPT2Config
from gpt_xp.conformance.adapter import check_known
from gpt_xp.errors import PromptError, SettingError
from gpt_xp.hub.find import find_model
from gpt_xp.prompts import check_ids
from gpt_xp.tokenizer.bpe import Tokenizer

TIMEOUT = 120.0  # seconds
MODEL = "shakespeare"
TEXT_TOKENS = 16


@dataclass(frozen=True)
class Inputs:
    """The model of the checks: its name, its directory and its config."""

    name: str
    folder: Path
    config: GPT2Config


def checked_inputs(module: str, model: str | Path | None, timeout: float) -> Inputs:
    """Return the model of the checks. Raises the errors of `conform`; nothing of the library is imported."""
    check_known(module)
    # NaN is refused here too. Python cannot wait longer than TIMEOUT_MAX, which depends on the system.
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise SettingError(
            f"timeout must be more than 0 and at most {threading.TIMEOUT_MAX:.0f} seconds, not {timeout!r:.80}"
        )
    name = str(model or MODEL)
    folder = find_model(name)
    found = checkpoint.read(folder)
    _check_prompts(found.tokenizer, found.config)
    return Inputs(name, folder, found.config)


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the prompts: short ones, because a lazy library can take seconds for a token."""
    return [tokenizer.encode(text) for text in PROMPTS[:2]]


def _check_prompts(tokenizer: Tokenizer, config: GPT2Config) -> None:
    """Raise `PromptError` unless the prompts, and the text that continues the first, fit the model."""
    continued, read = prompts_of(tokenizer)
    needed = max(len(continued) + TEXT_TOKENS, len(read))
    if needed > config.n_ctx:
        raise PromptError(
            f"the checks need a context of {needed} tokens, and this model has {config.n_ctx} (n_ctx): take another"
        )
    check_ids(np.asarray([*continued, *read]), config, tokenizer)
