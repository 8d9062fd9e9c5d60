"""A faster `sampling.choose` for top-k on the host, with NumPy.

Sorting a whole vocabulary and drawing noise for it take several percent of a decode step of the 124M model. The other
filters only look at the `top_k` largest scores, so the noise and filters are computed for these alone. The choices are
the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.generation.sampling import Choice, adjusted, keep_likeliest, largest, log_probability
from gpt_xp.types import Namespace

Draw = Callable[[int, "np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


def choose_among_few(
    logits: "np.ndarray[Any, Any]",
    draw: Draw,
    seen: "np.ndarray[Any, Any] | None",
    allowed: "np.ndarray[Any, Any] | None",
    temperature: float,
    top_k: int,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    xp: Namespace,
) -> Choice:
    """Choose from logits [batch, n_vocab], float32 or float64, with the same result as `choose`.

    `draw(row, ids)` returns the noise of those tokens. The other arguments are those of `choose`; `xp` is NumPy's.
    """
    scores = adjusted(logits, seen, allowed, temperature, repetition_penalty, xp)
    n_most = min(top_k, scores.shape[-1])
    threshold = np.partition(scores, -n_most, axis=-1)[:, -n_most]  # the smallest score that top-k keeps, [batch]
    found = []
    for row, (each, least) in enumerate(zip(scores, threshold, strict=True)):
        ids = np.flatnonzero(~(each < least))  # This keeps NaN too, which the caller finds in the probability.
        few = keep_likeliest(each[None, ids], top_k, top_p, min_p, xp) + draw(row, ids)
        place, margin = largest(few, temperature, xp)
        found.append((ids[place[0]], margin[0]))
    token, margins = (np.asarray(column) for column in zip(*found, strict=True))
    return Choice(token, log_probability(logits, token, xp), margins)
