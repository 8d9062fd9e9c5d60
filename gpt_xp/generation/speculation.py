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
from typing import Any, TypeAlias

import numpy as np

Tokens: TypeAlias = np.ndarray[Any, Any]

WIDTH = 8  # tokens of one pass: the last that was chosen, and 7 proposed (BLAS takes eight rows sooner than five)
LONGEST, SHORTEST = 4, 2  # tokens that must have stood before; a single one says too little of what follows

CREDIT = 3.0  # what speculation may lose before it stops, in steps of plain decoding
FADING = 0.98  # of a price that keeps perfect guesses off: it may have been measured in a bad moment


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
    """Whether speculation pays: an account of what it saves, in steps of plain decoding.

    Each pass earns the steps that it replaces, and costs its own time. While the account is overdrawn, decoding is
    plain; proposals are then watched, and earn and cost what they would have. Nothing above `CREDIT` or below
    -`CREDIT` is kept, so that the past is soon forgotten.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=9)  # seconds of the latest
        self._price = 0.0  # steps that the latest pass took as long as
        self._balance = CREDIT

    @property
    def is_open(self) -> bool:
        """Whether to speculate now: not before a step has shown what it costs."""
        return len(self._steps) > 0 and self._balance > 0

    def add_step(self, seconds: float) -> None:
        """Count a step of plain decoding."""
        self._steps.append(seconds)

    def add_pass(self, tokens: int, seconds: float) -> None:
        """Count a pass over proposed tokens, and how many tokens of each row it gave."""
        price = seconds / max(statistics.median(self._steps), 1e-9)
        self._add(tokens - price)
        self._price = min(price, WIDTH)  # more, and even a perfect guess could not open the account again

    def add_watched(self, tokens: int) -> None:
        """Count a pass that was not made, and how many tokens it would have given."""
        self._add(tokens - self._price)
        if tokens == WIDTH:
            self._price *= FADING

    def _add(self, gain: float) -> None:
        self._balance = max(-CREDIT, min(self._balance + gain, CREDIT))


class Speculation:
    """What to propose for the rows of a batch, and whether it turned out right.

    All rows advance together, so a proposal serves as far as it is right for every row that still goes on.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.account = Account()
        self._texts = [NGrams(text) for text in texts]
        self._watched: Tokens | None = None  # a proposal that plain decoding has borne out so far
        self._right = 0  # how many of its tokens

    def append(self, tokens: Tokens, alive: Sequence[bool]) -> None:
        """Add the next token of each row [batch]."""
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(int(token))
        if self._watched is not None:
            self._right += 1
            if not agree(tokens, self._watched, self._right - 1, alive):
                self.account.add_watched(self._right)
                self._watched = None

    def propose(self, alive: Sequence[bool]) -> Tokens | None:
        """Return proposed tokens [batch, WIDTH - 1] for the rows that are `alive`, and anything for the others.

        None if speculation does not pay now, or one of those rows has no proposal.
        """
        if self.account.is_open:
            self._watched = None
            return self._look_up(alive)
        if self._watched is None:
            self._watched, self._right = self._look_up(alive), 0
        return None

    def _look_up(self, alive: Sequence[bool]) -> Tokens | None:
        proposed = np.zeros((len(self._texts), WIDTH - 1), dtype=np.int32)
        for row in np.flatnonzero(alive):
            tokens = self._texts[row].propose(WIDTH - 1)
            if tokens is None:
                return None
            proposed[row] = tokens
        return proposed


def agree(tokens: Tokens, proposed: Tokens, place: int, alive: Sequence[bool]) -> bool:
    """Whether the tokens [batch] are those at one place of `proposed` [batch, n], in every row that is `alive`."""
    return place < proposed.shape[1] and bool(np.all((tokens == proposed[:, place])[alive]))
