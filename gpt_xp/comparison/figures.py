"""The figures of a comparison: how far two runs of one model differ, and whether that is only rounding."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt_xp.prompts import shared_length
from gpt_xp.tolerances import OUT_OF_LINE, TOLERANCE

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Difference:
    """The difference of an array to the reference: absolute, and relative to the reference's largest number.

    It is infinite where the array holds NaN or infinity.
    """

    max: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Flip:
    """A token that differs, in this prompt at this position; `margin` is the lead of the reference's choice there."""

    prompt: int
    position: int
    token: int
    expected: int
    margin: float


@dataclass(frozen=True)
class LogitFigures:
    """The logits at all positions of all prompts. KL divergences are from the reference's distribution, in nats."""

    difference: Difference
    kl_mean: float
    kl_max: float
    top1_agreement: float  # the share of positions at which the likeliest token is the same
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class LayerFigures:
    """The residual stream after one layer; it is out of line where its relative difference is above `allowed`."""

    name: str
    difference: Difference
    allowed: float

    @property
    def is_out_of_line(self) -> bool:
        """True if the difference is larger than rounding explains."""
        return not self.difference.relative <= self.allowed


@dataclass(frozen=True)
class TokenFigures:
    """The tokens chosen while both are forced to follow the reference's text, and a comparison of their free texts."""

    n_tokens: int
    flips: tuple[Flip, ...]
    shared: tuple[int, ...]  # for each prompt, how many tokens both free texts begin with
    length: int  # tokens of a free text


def layer_names(n_layer: int) -> list[str]:
    """Return the names of the layers in a trace."""
    return ["embedding", *(f"block {layer}" for layer in range(n_layer)), "ln_f"]


def difference(actual: list[FloatArray], expected: list[FloatArray]) -> Difference:
    """Compare arrays pair by pair, as if they were one."""
    errors = [np.abs(a.astype(np.float64) - e) for a, e in zip(actual, expected, strict=True)]
    scale = max(float(np.abs(e).max()) for e in expected)
    if not all(np.isfinite(error).all() for error in errors):
        return Difference(np.inf, np.inf, np.inf)
    largest = max(float(error.max()) for error in errors)
    mean = sum(float(error.sum()) for error in errors) / sum(error.size for error in errors)
    return Difference(largest, mean, largest / scale)


def compare_layers(actual: list[FloatArray], expected: list[FloatArray], dtype: str) -> tuple[LayerFigures, ...]:
    """Compare traces [n_layer + 2, n_seq, n_embd], one for each prompt, layer by layer."""
    row = TOLERANCE["layer", dtype]
    return tuple(
        LayerFigures(
            name,
            difference([each[depth] for each in actual], [each[depth] for each in expected]),
            OUT_OF_LINE * row * (depth + 1),
        )
        for depth, name in enumerate(layer_names(len(expected[0]) - 2))
    )


def compare_logits(actual: list[FloatArray], expected: list[FloatArray]) -> LogitFigures:
    """Compare logits [n_seq, n_vocab], one array for each prompt."""
    kl = np.concatenate([kl_divergence(a, e) for a, e in zip(actual, expected, strict=True)])
    flips = tuple(
        Flip(prompt, int(position), int(a[position].argmax()), int(e[position].argmax()), _lead(e[position]))
        for prompt, (a, e) in enumerate(zip(actual, expected, strict=True))
        for position in np.flatnonzero(a.argmax(axis=-1) != e.argmax(axis=-1))
    )
    return LogitFigures(
        difference(actual, expected), float(kl.mean()), float(kl.max()), 1 - len(flips) / len(kl), flips
    )


def kl_divergence(actual: FloatArray, expected: FloatArray) -> FloatArray:
    """Return KL(expected || actual) of the softmax of logits [n_seq, n_vocab], in nats: [n_seq]; inf for NaN."""
    log_p, log_q = _log_softmax(expected), _log_softmax(actual)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.where(np.isnan(kl), np.inf, np.maximum(kl, 0.0))  # Rounding can leave it a little below 0.


def compare_tokens(
    forced: list[list[tuple[int, float]]],
    expected: list[list[tuple[int, float]]],
    free: list[list[int]],
    free_expected: list[list[int]],
) -> TokenFigures:
    """Compare the choices at each step, which are pairs of a token and its margin."""
    flips = tuple(
        Flip(prompt, step, token, wanted, margin)
        for prompt, (row, wanted_row) in enumerate(zip(forced, expected, strict=True))
        for step, ((token, _), (wanted, margin)) in enumerate(zip(row, wanted_row, strict=True))
        if token != wanted
    )
    shared = tuple(shared_length(a, e) for a, e in zip(free, free_expected, strict=True))
    return TokenFigures(sum(map(len, expected)), flips, shared, max(map(len, free_expected)))


@dataclass(frozen=True)
class ComparisonFigures:
    """The figures of one backend. `tokens` has an entry for each mode, or none if generation failed."""

    layers: tuple[LayerFigures, ...]
    logits: LogitFigures
    tokens: dict[str, TokenFigures] = field(default_factory=dict)

    @property
    def first_out_of_line(self) -> LayerFigures | None:
        """The first layer that differs by more than rounding."""
        return next((layer for layer in self.layers if layer.is_out_of_line), None)

    def problems(self, dtype: str, largest_logit: float) -> list[str]:
        """Return a sentence for each figure outside the tolerance: where it is, its value, and the tolerance.

        `largest_logit` is the largest of the reference's logits.
        """
        allowed = TOLERANCE["logits", dtype]
        found = []
        if layer := self.first_out_of_line:
            found.append(
                f"{layer.name} differs by {layer.difference.relative:.1e} of its largest number "
                f"(allowed at this depth: {layer.allowed:.1e})"
            )
        if not self.logits.difference.relative <= allowed:
            found.append(
                f"the logits differ by {self.logits.difference.relative:.1e} of the largest (allowed: {allowed:.1e})"
            )
        # Two logits that are each off by the tolerance can swap their order where they differ by twice the tolerance.
        tie = 2 * allowed * largest_logit
        for what, flips in self.flips().items():
            worst = max(flips, key=lambda flip: flip.margin, default=None)
            if worst is not None and worst.margin > tie:
                found.append(
                    f"{what}: token {worst.token} instead of {worst.expected} in prompt {worst.prompt}, position "
                    f"{worst.position}, which was ahead by {worst.margin:.1e} (a tie: up to {tie:.1e})"
                )
        return found

    def flips(self) -> dict[str, tuple[Flip, ...]]:
        """Return the tokens that differ, for the logits and for each mode of generation."""
        return {"logits": self.logits.flips} | {mode: tokens.flips for mode, tokens in self.tokens.items()}


def _log_softmax(logits: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        log_p: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_p


def _lead(logits: FloatArray) -> float:
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)
