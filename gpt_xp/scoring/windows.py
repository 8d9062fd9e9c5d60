"""Cut a text into windows before it is scored.

A text longer than the context is read in windows. Their layout changes the figures by some percent, and published
figures follow one of three conventions:

- "huggingface", from transformers' page "Perplexity of fixed-length models": a window slides by `stride` tokens. Each
  position scores the tokens that the position before did not reach. A token with no token before it in its window is
  not scored: the first of the text, and with `stride` = `window` the first of every window.
- "lm-eval", `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness: every token is scored once. The first token
  is predicted from the token that begins a text. Windows follow each other, and the last reaches back to full length.
- "nanogpt", `estimate_loss` of nanoGPT's train.py: random crops, in which every token but the first is scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import numpy as np

from gpt_xp.errors import SettingError
from gpt_xp.settings import check_count

CONVENTIONS = ("huggingface", "lm-eval", "nanogpt")


class Window(NamedTuple):
    """The tokens `begin` to `end` of a text, which are read together; those from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True)
class Windows:
    """The settings that cut a text into windows. Raises `SettingError` for values that make no sense.

    `window` is the number of tokens in a window (default: the context). `stride` belongs to "huggingface" (default:
    half a window). `crops` (their number) and `seed` belong to "nanogpt".
    """

    convention: str = "huggingface"
    window: int | None = None
    stride: int | None = None
    crops: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise SettingError(f"convention must be one of {', '.join(CONVENTIONS)}, not {self.convention!r}")
        for name, owner in (("stride", "huggingface"), ("crops", "nanogpt")):
            if getattr(self, name) is not None and self.convention != owner:
                raise SettingError(f"{name} belongs to the convention {owner}, and {self.convention} has none")
        for name in ("window", "stride", "crops"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.seed, Integral) or not 0 <= int(self.seed) < 2**32:
            raise SettingError(f"seed must be a whole number from 0 to 2^32 - 1, not {self.seed!r}")

    def resolve(self, n_ctx: int) -> "Windows":
        """Return a copy with all defaults filled in. Raises `SettingError` where they do not fit the context."""
        window = n_ctx if self.window is None else self.window
        # With "huggingface" the first token of a window is not scored, so there must be a second one.
        least = 2 if self.convention == "huggingface" else 1
        if not least <= window <= n_ctx:
            raise SettingError(f"window must be from {least} to {n_ctx}, the context of this model, not {window}")
        if self.convention == "lm-eval":
            return replace(self, window=window)
        if self.convention == "nanogpt":
            return replace(self, window=window, crops=self.crops or 1000)
        stride = self.stride or window // 2
        if stride > window:
            raise SettingError(
                f"stride must be at most the window, {window}, or tokens would be left out: not {stride}"
            )
        return replace(self, window=window, stride=stride)

    def cut(self, n: int) -> Iterator[Window]:
        """Yield the windows of `n` tokens. For "lm-eval", `n` counts the token that is put before the text."""
        assert self.window is not None
        if self.convention == "lm-eval":
            return rolling(n, self.window)
        if self.convention == "nanogpt":
            return random_crops(n, self.window, self.crops or 0, self.seed)
        return sliding(n, self.window, self.stride or 0)


def sliding(n: int, window: int, stride: int) -> Iterator[Window]:
    """Yield windows of at most `window` of `n` tokens, `stride` apart."""
    end = 0
    for begin in range(0, n, stride):
        done, end = end, min(begin + window, n)
        yield Window(begin, end, max(done, begin + 1))
        if end == n:
            return


def rolling(n: int, window: int) -> Iterator[Window]:
    """Yield windows that each score the next `window` of `n` tokens, except the very first token.

    All windows have full length where there are several.
    """
    for first in range(1, n, window):
        end = min(first + window, n)
        # One token more than `window`, because the last is predicted and not read.
        yield Window(max(end - window - 1, 0), end, first)


def random_crops(n: int, window: int, crops: int, seed: int) -> Iterator[Window]:
    """Yield `crops` windows at random places of `n` tokens; each scores `window` tokens."""
    # The stream of RandomState never changes between versions of NumPy, unlike that of default_rng.
    for begin in np.random.RandomState(seed).randint(0, n - window, size=crops).tolist():
        yield Window(begin, begin + window + 1, begin + 1)
