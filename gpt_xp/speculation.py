"""Speculation by prompt lookup: guess the next tokens from the text so far, and stop guessing where it does not pay.

Where the last few tokens stood before, what followed them there is proposed to follow here too. One pass of the model
over all proposed tokens costs less than a pass for each, and shows which of them plain decoding would have chosen.
So repetitive text, code and summaries come sooner, and the text is the same.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (guess and verify);
Saxena 2023, "Prompt Lookup Decoding" (guess by n-grams).
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WIDTH = 8  # tokens of one pass: the last that was chosen, and 7 proposed (BLAS takes eight rows sooner than five)
LONGEST, SHORTEST = 4, 2  # tokens that must have stood before; a single one says too little of what follows

# In steps of plain decoding:
CREDIT = 3.0  # what speculation may lose before it pauses
FIRST_PAUSE = 16  # how long; twice as long each time, until it has paid again


class NGrams:
    """A growing text, and what followed each of its n-grams the last time."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after its last occurrence stands
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        for n in range(SHORTEST, min(LONGEST, len(self._tokens)) + 1):
            self._after[tuple(self._tokens[-n:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self, count: int) -> list[int] | None:
        """Return the `count` tokens that followed the longest n-gram at the text's end when it last stood before.

        Where the text ends sooner, what followed is repeated: a text that is in a loop stays in it. None if the text
        ends in nothing that stood before.
        """
        for n in range(min(LONGEST, len(self._tokens)), SHORTEST - 1, -1):
            begin = self._after.get(tuple(self._tokens[-n:]))
            if begin is not None:
                period = len(self._tokens) - begin
                return [self._tokens[begin + i % period] for i in range(count)]
        return None


class Account:
    """Whether speculation pays: an account of the seconds that it saves.

    Each pass earns the time of the plain steps that it replaces, and costs its own. An account that is overdrawn by
    `CREDIT` pauses speculation, and begins anew after the pause; nothing above `CREDIT` is saved up, or an old gain
    would pay for a long loss.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=9)  # seconds of the latest steps
        self._balance = 0.0  # seconds
        self._pause = FIRST_PAUSE
        self._waiting = 1  # plain steps to go: the first shows what a step costs

    @property
    def is_open(self) -> bool:
        """Whether to speculate now."""
        return self._waiting == 0

    def add_step(self, seconds: float) -> None:
        """Count a step of plain decoding."""
        self._plain.append(seconds)
        self._waiting = max(self._waiting - 1, 0)

    def add_pass(self, tokens: int, seconds: float) -> None:
        """Count a pass over proposed tokens, and how many tokens of each row it gave."""
        step = statistics.median(self._plain)
        credit = CREDIT * step
        self._balance = min(self._balance + tokens * step - seconds, credit)
        if self._balance == credit:
            self._pause = FIRST_PAUSE
        elif self._balance < -credit:
            self._balance, self._waiting, self._pause = 0.0, self._pause, 2 * self._pause


class Speculation:
    """What to propose for the rows of a batch.

    All rows advance together, so proposals serve as far as they are right for every row that still goes on.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.account = Account()
        self._texts = [NGrams(text) for text in texts]

    def append(self, tokens: Iterable[Any]) -> None:
        """Add the next token of each row."""
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(int(token))

    def propose(self, alive: Sequence[bool]) -> "np.ndarray[Any, np.dtype[np.int32]] | None":
        """Return proposed tokens [batch, WIDTH - 1] for the rows that are `alive`, and anything for the others.

        None if speculation does not pay now, or one of those rows has no proposal.
        """
        if not self.account.is_open:
            return None
        proposed = np.zeros((len(self._texts), WIDTH - 1), dtype=np.int32)
        for row in np.flatnonzero(alive):
            tokens = self._texts[row].propose(WIDTH - 1)
            if tokens is None:
                return None
            proposed[row] = tokens
        return proposed
