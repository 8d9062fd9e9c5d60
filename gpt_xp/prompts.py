"""The types of prompts that a model takes: text or token ids, one or several."""

from collections.abc import Sequence
from itertools import takewhile
from numbers import Number
from typing import Any, TypeAlias

import numpy as np

from gpt_xp.config import GPT2Config
from gpt_xp.errors import PromptError

Text: TypeAlias = str | Sequence[int]  # a prompt: text, or token ids
OnePrompt: TypeAlias = str | list[int] | tuple[int, ...]
Prompts: TypeAlias = list[str] | tuple[str, ...] | list[list[int]] | tuple[list[int], ...] | list[str | list[int]]
Numbers: TypeAlias = np.ndarray[Any, Any]  # token ids, [n_seq] or [batch, n_seq]


def is_one_prompt(prompt: Any) -> bool:
    """Return whether this is one prompt, not a list of prompts. Raises `PromptError` if it is neither."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, list | tuple) and not (isinstance(prompt, np.ndarray) and prompt.ndim in (1, 2)):
        raise PromptError(f"a prompt is text (str) or a list of token ids, and several are a list, not {prompt!r:.80}")
    return len(prompt) > 0 and isinstance(prompt[0], Number)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many token ids at the start are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def token_array(token_ids: Any) -> "np.ndarray[Any, Any]":
    """Return token ids as an array of integers, [n_seq] or [batch, n_seq]. Raises `PromptError` if they are none."""
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # The rows differ in length.
        raise PromptError("token_ids must be rows of one length, [batch, n_seq]: ask for each row alone") from None
    if ids.ndim not in (1, 2) or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(
            f"token_ids must be whole numbers in an array [n_seq] or [batch, n_seq], not {ids.dtype} {ids.shape}"
        )
    return ids


def check_ids(ids: "np.ndarray[Any, Any]", config: GPT2Config, tokenizer: Any) -> None:
    """Raise `PromptError` for ids outside the vocabulary. `tokenizer` (or None) tells what such an id stands for.

    They are checked on the host, because CuPy wraps an id that is out of range, and JAX clamps it, silently.
    """
    wrong = ids[(ids < 0) | (ids >= config.n_vocab)]
    if wrong.size:
        token = None if tokenizer is None else tokenizer.decoder.get(int(wrong[0]))
        spelled = "" if token is None else f", {token!r} in the tokenizer,"
        raise PromptError(
            f"token id {wrong[0]}{spelled} is not in the model's vocabulary: ids go from 0 to {config.n_vocab - 1}"
        )
