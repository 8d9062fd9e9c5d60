"""Chooses the next token of each row where that is fastest: on the device, or with NumPy on the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_xp.backend import Backend
from gpt_xp.config import GPT2Config
from gpt_xp.errors import NumericalError
from gpt_xp.generation.host_sampling import choose_among_few
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.rows import Prompt
from gpt_xp.generation.sampling import Choice, choose
from gpt_xp.generation.step_functions import mark
from gpt_xp.registry import get_backend
from gpt_xp.settings import GenerationSettings
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.types import Array


class Chooser:
    """The compiled sampling functions of a model on its backend. It holds no state of a generation."""

    def __init__(self, config: GPT2Config, tokenizer: Tokenizer | None, backend: Backend) -> None:
        self.backend, self.n_vocab = backend, config.n_vocab
        self.on_host = backend.samples_on_host and backend.decode_block is None
        self.xp = get_backend("numpy").xp if self.on_host else backend.xp
        self.asarray = np.asarray if self.on_host else backend.asarray
        self.choose = choose if self.on_host else backend.compile(choose, static=("top_k", "xp"))
        self.mark = mark if self.on_host else backend.compile(mark, static=("xp",))
        self.allowed = self._allowed_ids(tokenizer)

    def _allowed_ids(self, tokenizer: Tokenizer | None) -> Array | None:
        """Return which ids [n_vocab] have a token, so that they may be chosen; None if all have one."""
        if tokenizer is None or len(tokenizer) == tokenizer.n_vocab >= self.n_vocab:
            return None
        allowed = np.zeros(self.n_vocab, dtype=np.bool_)
        allowed[[id for id in tokenizer.ids if id < self.n_vocab]] = True
        return self.asarray(allowed)


class Choosing:
    """Chooses the tokens of one generation, by its settings, its noise, and the tokens that each row has so far."""

    def __init__(self, chooser: Chooser, prompts: Sequence[Prompt], settings: GenerationSettings) -> None:
        self.chooser, self.filters = chooser, settings.filters
        self._prompts = prompts
        self.seen: Array | None = None  # [batch, n_vocab] bool; only the repetition penalty needs it
        if self.filters["repetition_penalty"] is not None:
            seen = np.zeros((len(prompts), chooser.n_vocab), dtype=np.bool_)
            for row, prompt in zip(seen, prompts, strict=True):
                row[list(prompt.token_ids)] = True
            self.seen = chooser.asarray(seen)

    def choose(self, logits: Array, step: int) -> Choice:
        """Choose from logits [batch, n_vocab] at this step. The `Choice` holds NumPy arrays.

        Raises `NumericalError` if the logits are not finite.
        """
        chooser, filters = self.chooser, self.filters
        greedy = filters["temperature"] is None
        if chooser.backend.choose_likeliest and greedy and self.seen is None:
            return checked(chooser.backend.choose_likeliest(logits, chooser.allowed), chooser.backend)
        arguments = filters | {"seen": self.seen, "allowed": chooser.allowed, "xp": chooser.xp}
        if chooser.on_host:
            logits = chooser.backend.to_numpy(logits)
            if filters["top_k"] is not None:
                return checked(choose_among_few(logits, self._drawing(step), **arguments), chooser.backend)
        noise = None if greedy else chooser.asarray(self._noise(step))
        choice = chooser.choose(logits, noise=noise, **arguments)
        if not chooser.on_host:
            choice = Choice(*map(chooser.backend.to_numpy, choice))
        return checked(choice, chooser.backend)

    def add(self, token: Any) -> None:
        """Remember the token [batch] that each row continues with, for the repetition penalty."""
        if self.seen is not None:
            token = self.chooser.asarray(np.asarray(token, dtype=np.int32))
            self.seen = self.chooser.mark(self.seen, token, xp=self.chooser.xp)

    def block_noise(self, step: int, n_steps: int, end: int) -> "np.ndarray[Any, Any] | None":
        """Return the noise [n_steps, batch, n_vocab] of the steps from `step` on; zeros from step `end` on."""
        if self.filters["temperature"] is None or step >= end:
            return None
        noise = np.zeros((n_steps, len(self._prompts), self.chooser.n_vocab), dtype=np.float32)
        for index in range(min(n_steps, end - step)):
            noise[index] = self._noise(step + index)
        return noise

    def _noise(self, step: int) -> "np.ndarray[Any, Any]":
        n_vocab = self.chooser.n_vocab
        return np.stack([gumbel_noise(each.seed, each.sample, step, n_vocab) for each in self._prompts])

    def _drawing(self, step: int) -> Any:
        def draw(row: int, ids: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
            prompt = self._prompts[row]
            return gumbel_noise(prompt.seed, prompt.sample, step, self.chooser.n_vocab, ids)

        return draw


def checked(choice: Choice, backend: Backend) -> Choice:
    """Return the choice, which holds NumPy arrays. Raises `NumericalError` if the logits were not finite."""
    if not np.isfinite(choice.logprob).all():
        raise not_finite(backend)
    return choice


def not_finite(backend: Backend) -> NumericalError:
    """Return the error for logits that are not finite."""
    return NumericalError(
        f"the model's logits are not finite in {backend.dtype}: its weights are damaged (NaN), or need a wider dtype"
    )
