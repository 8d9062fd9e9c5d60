"""Chooses the next token from logits, in the array API.

Sampling is argmax(logits / temperature + Gumbel noise). Scores that the filters refuse become the smallest number. A
difference in the last bit of a logit then changes the draw only where two tokens are almost tied. Sampling from the
cumulative probabilities is not so stable. So backends that agree up to rounding draw the same tokens.

The filters have the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from typing import NamedTuple

from array_api_compat import array_namespace

from gpt_xp.arrays import at_least_float32, device_of
from gpt_xp.transformer import softmax
from gpt_xp.types import Array, Namespace


class Choice(NamedTuple):
    """The next token of each row; every field is [batch].

    `logprob` is the natural log of its probability under the model itself, before any filter or temperature.
    `margin` is its lead over the second choice, in units of logits. If the margin is below the rounding error of the
    logits, another backend may choose the second one and is right too.
    """

    token: Array  # int
    logprob: Array  # float32, or float64 for float64 logits
    margin: Array


def choose(
    logits: Array,
    noise: Array | None = None,
    seen: Array | None = None,
    allowed: Array | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    xp: Namespace = None,
) -> Choice:
    """Choose a token from logits [batch, n_vocab]; with `temperature` None, the likeliest.

    `noise` [batch, n_vocab] is Gumbel noise. `seen` [batch, n_vocab] marks the tokens of the text so far, and `allowed`
    [n_vocab] the ids that have a token. Ties go to the lowest id. Under a compiler, `top_k` is static.
    """
    xp = xp or array_namespace(logits)
    logits = at_least_float32(logits, xp)
    scores = adjusted(logits, seen, allowed, temperature, repetition_penalty, xp)
    if temperature is not None:
        scores = keep_likeliest(scores, top_k, top_p, min_p, xp) + noise
    token, margin = largest(scores, temperature, xp)
    return Choice(token, log_probability(logits, token, xp), margin)


def adjusted(
    logits: Array,
    seen: Array | None,
    allowed: Array | None,
    temperature: float | None,
    repetition_penalty: float | None,
    xp: Namespace,
) -> Array:
    """Return the scores [batch, n_vocab] for the filters: logits, penalized, divided by the temperature, masked."""
    scores = logits
    if repetition_penalty is not None:
        scores = xp.where(seen, penalize(scores, repetition_penalty, xp), scores)
    if temperature is not None:
        # The maximum is subtracted first, so that no temperature causes an overflow.
        scores = (scores - xp.max(_masked(scores, allowed, xp), axis=-1, keepdims=True)) / temperature
    return _masked(scores, allowed, xp)  # Masked last, because arithmetic with the smallest number overflows.


def _masked(scores: Array, allowed: Array | None, xp: Namespace) -> Array:
    return scores if allowed is None else xp.where(allowed, scores, lowest(scores, xp))


def largest(scores: Array, temperature: float | None, xp: Namespace) -> tuple[Array, Array]:
    """Return the index of the largest score of each row [batch], and its margin over the second in units of logits."""
    token = xp.argmax(scores, axis=-1)
    ids = xp.arange(scores.shape[-1], dtype=xp.int32, device=device_of(token))
    chosen = ids == xp.astype(token, xp.int32)[:, None]  # [batch, n_vocab]
    best = xp.max(scores, axis=-1)
    second = xp.max(xp.where(chosen, lowest(scores, xp), scores), axis=-1)
    return token, clip_margin(best - second, xp) * (1 if temperature is None else temperature)


def clip_margin(difference: Array, xp: Namespace) -> Array:
    """Return the difference of two scores, limited so that it cannot overflow if the filters leave one token."""
    return xp.clip(difference, 0.0, 1e6)


def lowest(x: Array, xp: Namespace) -> Array:
    """Return the smallest finite number of `x`'s dtype, as a scalar array. A Python float could change the dtype."""
    return xp.full((), float(xp.finfo(x.dtype).min), dtype=x.dtype, device=device_of(x))


def penalize(scores: Array, penalty: float, xp: Namespace) -> Array:
    """Make every token less likely: divide positive scores, multiply negative ones (Keskar et al. 2019, CTRL)."""
    return xp.where(scores > 0, scores / penalty, scores * penalty)


def keep_likeliest(scores: Array, top_k: int | None, top_p: float | None, min_p: float | None, xp: Namespace) -> Array:
    """Return scores [batch, n_vocab] with those that a filter refuses set to the smallest number.

    top-k (Fan et al. 2018) keeps the k largest. top-p (Holtzman et al. 2020) keeps the fewest whose probabilities sum
    to p. min-p (Nguyen et al. 2024) keeps those that are at least p times as likely as the likeliest.
    """
    if top_k is not None or top_p is not None:
        # Only values are sorted, so the sort need not be stable, and NumPy is 30 times as fast then.
        n_most = min(top_k or scores.shape[-1], scores.shape[-1])
        ordered = xp.sort(scores, axis=-1, descending=True, stable=False)[:, :n_most]
        count = xp.full((scores.shape[0], 1), n_most, dtype=xp.int32, device=device_of(scores))
        if top_p is not None:
            probs = softmax(ordered, xp)
            needed = xp.cumulative_sum(probs, axis=-1) - probs < top_p
            count = xp.sum(xp.astype(needed, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
        scores = keep_largest(scores, ordered, count, xp)
    if min_p is not None:
        likely = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True)) >= min_p
        scores = xp.where(likely, scores, lowest(scores, xp))
    return scores


def keep_largest(scores: Array, ordered: Array, count: Array, xp: Namespace) -> Array:
    """Keep exactly `count` [batch, 1] scores of each row; among equal scores, those of the lowest ids."""
    threshold = xp.take_along_axis(ordered, count - 1, axis=-1)  # [batch, 1]
    above, equal = scores > threshold, scores == threshold
    room = count - xp.sum(xp.astype(above, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    rank = xp.cumulative_sum(xp.astype(equal, xp.int32), axis=-1, dtype=xp.int32)  # among equal scores
    keep = above | (equal & (rank <= room))
    return xp.where(keep, scores, lowest(scores, xp))


def log_probability(logits: Array, token: Array, xp: Namespace) -> Array:
    """Return the log of the softmax of `logits` [batch, n_vocab] at one token per row [batch]."""
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    chosen = xp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return chosen - xp.log(xp.sum(xp.exp(shifted), axis=-1))
