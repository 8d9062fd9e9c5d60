"""The figures of a benchmark: what the seconds of many turns come to."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt_xp.generation.decoder import BLOCK

N_NEW = 1 + BLOCK  # the first token is prefill's, and the others fill a block of a backend that decodes in blocks


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `context` tokens each, which are continued by `n_new` tokens."""

    context: int
    batch: int = 1
    n_new: int = N_NEW


@dataclass(frozen=True)
class Turn:
    """One run of one workload: the seconds of prefill, and of a later token of every row (the median of the run)."""

    prefill: float
    decode: float | None


@dataclass(frozen=True)
class Spread:
    """The median of several numbers, and the quartiles: half of them lie between `low` and `high`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Phase:
    """Prefill or decode of one contender in one workload, over all rounds.

    `seconds` are those of a whole prefill, or of one token of every row, and `tokens_per_second` is over all rows.
    `ratio` is of its seconds to those of the reference, and `floor_ratio` to the floor's, each within one round: the
    machine may be slower in some rounds than in others. None where there is nothing to compare with.
    """

    seconds: Spread
    tokens_per_second: float
    ratio: Spread | None
    floor_ratio: Spread | None


@dataclass(frozen=True)
class Figures:
    """One contender in one workload; `decode` is None where only one token is generated."""

    prefill: Phase
    decode: Phase | None


def turn_of(seconds: Sequence[float]) -> Turn:
    """Return the turn whose tokens took so many seconds; the first of them is prefill."""
    prefill, *later = seconds
    return Turn(prefill, statistics.median(later) if later else None)


def spread(numbers: Sequence[float]) -> Spread:
    """Return median and quartiles, which lie on a line between neighbours where no number is in the place."""
    low, median, high = np.quantile(numbers, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def figures(
    turns: Sequence[Turn], workload: Workload, reference: Sequence[Turn] = (), floor: Sequence[Turn] = ()
) -> Figures:
    """Return what a contender's turns come to, beside the reference's and the floor's turns of the same rounds.

    These are empty where there is nobody to compare with.
    """
    of_all = (turns, reference, floor)
    prefill = _phase(workload.batch * workload.context, *([turn.prefill for turn in each] for each in of_all))
    decode = None
    if workload.n_new > 1:
        decode = _phase(workload.batch, *map(_decode, of_all))
    return Figures(prefill, decode)


def _phase(n_tokens: int, seconds: Sequence[float], reference: Sequence[float], floor: Sequence[float]) -> Phase:
    found = spread(seconds)
    return Phase(found, n_tokens / found.median, _ratio(seconds, reference), _ratio(seconds, floor))


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> Spread | None:
    return spread([mine / theirs for mine, theirs in zip(seconds, others, strict=True)]) if others else None


def _decode(turns: Sequence[Turn]) -> list[float]:
    return [turn.decode for turn in turns if turn.decode is not None]
