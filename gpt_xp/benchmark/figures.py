"""The figures of a benchmark: medians, quartiles and ratios of the times of many turns."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The first token belongs to prefill. The other 16 are one block of a backend that decodes in blocks.
N_NEW = 17


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `context` tokens each, and `n_new` tokens to generate from each."""

    context: int
    batch: int = 1
    n_new: int = N_NEW


@dataclass(frozen=True)
class Turn:
    """One run of one workload: the seconds of prefill, and the median seconds of a later token of all rows."""

    prefill: float
    decode: float | None


@dataclass(frozen=True)
class Spread:
    """The median of several numbers and their quartiles: half of the numbers lie between `low` and `high`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Phase:
    """Prefill or decode of one contender in one workload, over all rounds.

    `seconds` are the time of a whole prefill, or of one token of all rows; `tokens_per_second` counts all rows.
    `ratio` divides its seconds by those of the reference, and `floor_ratio` by those of the floor. Each ratio is taken
    within one round, because the machine may be slower in some rounds. They are None without anything to compare with.
    """

    seconds: Spread
    tokens_per_second: float
    ratio: Spread | None
    floor_ratio: Spread | None


@dataclass(frozen=True)
class WorkloadFigures:
    """The figures of one contender in one workload; `decode` is None where only one token is generated."""

    prefill: Phase
    decode: Phase | None


def turn_of(seconds: Sequence[float]) -> Turn:
    """Return the turn of a run; the first of the `seconds` is prefill, and the others are one later token each."""
    prefill, *later = seconds
    return Turn(prefill, statistics.median(later) if later else None)


def spread(numbers: Sequence[float]) -> Spread:
    """Return the median and the quartiles, with linear interpolation between neighbours."""
    low, median, high = np.quantile(numbers, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def workload_figures(
    turns: Sequence[Turn], workload: Workload, reference: Sequence[Turn] = (), floor: Sequence[Turn] = ()
) -> WorkloadFigures:
    """Return the figures of a contender's turns, with ratios to the reference's and the floor's turns of these rounds.

    `reference` and `floor` are empty where there is nothing to compare with.
    """
    compared = (turns, reference, floor)
    prefill = _phase(workload.batch * workload.context, *([turn.prefill for turn in each] for each in compared))
    decode = None
    if workload.n_new > 1:
        decode = _phase(workload.batch, *map(_decode, compared))
    return WorkloadFigures(prefill, decode)


def _phase(n_tokens: int, seconds: Sequence[float], reference: Sequence[float], floor: Sequence[float]) -> Phase:
    found = spread(seconds)
    return Phase(found, n_tokens / found.median, _ratio(seconds, reference), _ratio(seconds, floor))


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> Spread | None:
    return spread([mine / theirs for mine, theirs in zip(seconds, others, strict=True)]) if others else None


def _decode(turns: Sequence[Turn]) -> list[float]:
    return [turn.decode for turn in turns if turn.decode is not None]
