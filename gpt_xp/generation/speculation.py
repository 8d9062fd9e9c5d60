"""Speculation by prompt lookup: guesses the next tokens from the text so far, as long as that saves time.

If the last few tokens occur earlier in the text, the tokens that followed them there are proposed again. One pass of
the model over all proposed tokens is faster than a pass for each. It shows which of them plain decoding would have
chosen. So repetitive text, code and summaries are generated faster, and the text is the same.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (guess and verify);
Saxena 2023, "Prompt Lookup Decoding" (guess by n-grams).
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from gpt_xp.types import NumpyArray

PASS_TOKENS = 8  # of one pass: the last chosen token and 7 proposed ones (BLAS computes 8 rows faster than 5)
LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2  # tokens that must occur earlier; a single one predicts too little

CREDIT = 3.0  # steps of plain decoding that speculation may lose before it stops
PRICE_DECAY = 0.98  # A price that stops even perfect guesses is lowered, as it may have been measured at a bad moment.


class NGrams:
    """A growing text, with an index of the tokens that follow its n-grams."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        for n in range(SHORTEST_NGRAM, min(LONGEST_NGRAM, len(self._tokens)) + 1):
            self._after[tuple(self._tokens[-n:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self, count: int) -> list[int] | None:
        """Return the `count` tokens that followed the earlier occurrence of the longest n-gram at the text's end.

        If fewer tokens follow, they are repeated, so that a text in a loop stays in it. Return None if no n-gram at the
        end occurs earlier.
        """
        for n in range(min(LONGEST_NGRAM, len(self._tokens)), SHORTEST_NGRAM - 1, -1):
            begin = self._after.get(tuple(self._tokens[-n:]))
            if begin is not None:
                period = len(self._tokens) - begin
                return [self._tokens[begin + i % period] for i in range(count)]
        return None


class Account:
    """Decides when to speculate: an account of the time that it saves, in steps of plain decoding.

    Each pass earns the steps that it replaces, and costs its own time. While the account is overdrawn, decoding is
    plain. Proposals are then only compared with its tokens, and earn and cost as much as a real pass would. The balance
    stays between -`CREDIT` and `CREDIT`, so that the past is soon forgotten.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=9)  # seconds of the latest steps
        self._price = 0.0  # time of the latest pass, in steps
        self._balance = CREDIT

    @property
    def is_open(self) -> bool:
        """True if speculation should be used now. It is False until a plain step was measured."""
        return len(self._steps) > 0 and self._balance > 0

    def add_step(self, seconds: float) -> None:
        """Count a step of plain decoding."""
        self._steps.append(seconds)

    def add_pass(self, tokens: int, seconds: float) -> None:
        """Count a pass over proposed tokens, which gave `tokens` tokens of each row."""
        price = seconds / max(statistics.median(self._steps), 1e-9)
        self._add(tokens - price)
        self._price = min(price, PASS_TOKENS)  # With a higher price, even perfect guesses could not open the account.

    def add_watched(self, tokens: int) -> None:
        """Count a pass that was not made, which would have given `tokens` tokens of each row."""
        self._add(tokens - self._price)
        if tokens == PASS_TOKENS:
            self._price *= PRICE_DECAY

    def _add(self, gain: float) -> None:
        self._balance = max(-CREDIT, min(self._balance + gain, CREDIT))


class Speculation:
    """Proposes tokens for the rows of a batch, and keeps the account of how many were right.

    All rows advance together, so a proposal is used only as far as it is right for every unfinished row.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.account = Account()
        self._texts = [NGrams(text) for text in texts]
        self._watched: NumpyArray | None = None  # a proposal that plain decoding has confirmed so far
        self._right = 0  # the number of its tokens that are confirmed

    def append(self, tokens: NumpyArray, alive: Sequence[bool]) -> None:
        """Add the next token of each row [batch]."""
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(int(token))
        if self._watched is not None:
            self._right += 1
            if not agree(tokens, self._watched, self._right - 1, alive):
                self.account.add_watched(self._right)
                self._watched = None

    def propose(self, alive: Sequence[bool]) -> NumpyArray | None:
        """Return proposed tokens [batch, PASS_TOKENS - 1] for the rows that are `alive`, and zeros for the others.

        Return None if speculation does not save time now, or if one of those rows has no proposal.
        """
        if self.account.is_open:
            self._watched = None
            return self._look_up(alive)
        if self._watched is None:
            self._watched, self._right = self._look_up(alive), 0
        return None

    def _look_up(self, alive: Sequence[bool]) -> NumpyArray | None:
        proposed = np.zeros((len(self._texts), PASS_TOKENS - 1), dtype=np.int32)
        for row in np.flatnonzero(alive):
            tokens = self._texts[row].propose(PASS_TOKENS - 1)
            if tokens is None:
                return None
            proposed[row] = tokens
        return proposed


def agree(tokens: NumpyArray, proposed: NumpyArray, place: int, alive: Sequence[bool]) -> bool:
    """Return whether tokens [batch] equal column `place` of `proposed` [batch, n] in every row that is `alive`."""
    return place < proposed.shape[1] and bool(np.all((tokens == proposed[:, place])[alive]))
