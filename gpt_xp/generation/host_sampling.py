"""What `sampling.choose` returns, on the host and in less time where top-k leaves few tokens: on NumPy alone.

Sorting a vocabulary and drawing noise for it take several percent of a decode step of the 124M model. All that the
other filters look at are the `top_k` largest scores, so the rest of the work is done with them. Both choose the same.
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
    """Choose from logits [batch, n_vocab], float32 or float64, as `choose` does with the noise of all tokens.

    `draw(row, ids)` returns the noise of those tokens; the other arguments are those of `choose`, `xp` a NumPy.
    """
    scores = adjusted(logits, seen, allowed, temperature, repetition_penalty, xp)
    n_most = min(top_k, scores.shape[-1])
    threshold = np.partition(scores, -n_most, axis=-1)[:, -n_most]  # the last score that top-k keeps
    found = []
    for row, (each, least) in enumerate(zip(scores, threshold, strict=True)):
        ids = np.flatnonzero(~(each < least))  # NaN, too, is found: the caller sees it in the probability
        few = keep_likeliest(each[None, ids], top_k, top_p, min_p, xp) + draw(row, ids)
        place, margin = largest(few, temperature, xp)
        found.append((ids[place[0]], margin[0]))
    token, margins = (np.asarray(column) for column in zip(*found, strict=True))
    return Choice(token, log_probability(logits, token, xp), margins)
