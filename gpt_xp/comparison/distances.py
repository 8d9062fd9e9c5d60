"""The distance of backends from float64 on NumPy for one prompt: token by token, layer by layer."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt_xp.comparison.driver import ProcessOutput, check_backends, run_all
from gpt_xp.comparison.figures import FloatArray
from gpt_xp.comparison.results import BackendResult
from gpt_xp.processes import StageProgress, no_stage_progress
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.types import NumpyArray


@dataclass(frozen=True, eq=False)
class Distance:
    """How far one backend is from float64 on NumPy, for this prompt. The figures are those of `compare`.

    `relative` float64 [n_layer + 3, n_seq] is the largest error of a token after each layer (the embedding, the blocks,
    ln_f, the logits), divided by the layer's largest number. The largest of a row is `compare`'s figure. `allowed`
    [n_layer + 3] is the tolerance of the row. `is_same` bool [n_seq] tells whether the likeliest next token is the
    same, and `margins` float64 [n_seq] by how much the reference's is ahead. `problems` are empty if all is within the
    tolerance. The arrays are None where the backend could not run, and `problems` says why.
    """

    backend: str
    dtype: str
    version: str | None = None
    device: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    relative: NumpyArray | None = None
    allowed: NumpyArray | None = None
    is_same: NumpyArray | None = None
    margins: NumpyArray | None = None
    problems: tuple[str, ...] = ()


def distances(
    folder: Path,
    ids: Sequence[int],
    backends: str | Sequence[str],
    *,
    dtype: str = "float32",
    threads: int | None = None,
    progress: StageProgress = no_stage_progress,
) -> tuple[Distance, ...]:
    """Return how far each backend is from float64 for one prompt of the model in `folder`.

    The other arguments and the errors are those of `compare`. Nothing is generated.
    """
    names = check_backends(backends, [dtype])
    job = {"model": str(folder), "prompts": [list(map(int, ids))], "max_tokens": 0, "seed": 0, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="gpt-xp-compare-") as temporary:
        _, runs = run_all(Path(temporary), names, [dtype], job, progress, keep=_distance)
        return tuple(runs)


def _distance(result: BackendResult, outcome: ProcessOutput, reference: ProcessOutput) -> Distance:
    """Return the `Distance` of one run."""
    about = {name: getattr(result, name) for name in ("backend", "dtype", "version", "device", "settings")}
    if result.figures is None:
        why = (result.skipped,) if result.skipped else result.problems
        return Distance(**about, problems=why)
    layers, logits = next(outcome.arrays("layers")), next(outcome.arrays("logits"))
    expected, expected_logits = next(reference.arrays("layers")), next(reference.arrays("logits"))
    pairs = [*zip(layers, expected, strict=True), (logits, expected_logits)]
    second, first = np.partition(expected_logits, -2, axis=-1)[:, -2:].T
    return Distance(
        **about,
        relative=np.stack([error_of_each_token(*pair) for pair in pairs]),
        allowed=np.array([*(layer.allowed for layer in result.figures.layers), TOLERANCE["logits", result.dtype]]),
        is_same=logits.argmax(axis=-1) == expected_logits.argmax(axis=-1),
        margins=first - second,
        problems=result.problems,
    )


def error_of_each_token(actual: FloatArray, expected: FloatArray) -> FloatArray:
    """Return the largest error of each token, divided by the largest number of all: [n_seq, n] -> [n_seq]."""
    errors: FloatArray = np.abs(actual.astype(np.float64) - expected).max(axis=-1) / np.abs(expected).max()
    return np.where(np.isfinite(errors), errors, np.inf)
