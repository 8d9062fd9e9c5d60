"""The records of a comparison."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gpt_xp.comparison.figures import ComparisonFigures
from gpt_xp.config import GPT2Config
from gpt_xp.tree import finite
from gpt_xp.version import __version__


@dataclass(frozen=True)
class BackendResult:
    """The result of one backend in one dtype.

    `figures` is None where the backend could not run. `problems` says why, or which figures are outside the tolerance.
    `skipped` says why a dtype was left out in which the backend does not compute.
    """

    backend: str
    dtype: str
    device: str | None = None
    version: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    figures: ComparisonFigures | None = None
    problems: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def is_ok(self) -> bool:
        """True if all figures are within the tolerance of the dtype."""
        return not self.problems


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. `runs` has an element for each backend and dtype.

    `reference` is NumPy in float64, with which all others were compared.
    """

    model: str
    config: GPT2Config
    prompts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    seed: int
    reference: BackendResult
    runs: tuple[BackendResult, ...]
    version: str = __version__

    @property
    def is_ok(self) -> bool:
        """True if every backend is within the tolerance of its dtype, and at least one was not skipped."""
        return all(run.is_ok for run in self.runs) and any(run.figures for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold; numbers that are not finite become None."""
        content = dataclasses.asdict(self)
        content["is_ok"] = self.is_ok
        for record, run in zip(content["runs"], self.runs, strict=True):
            record["is_ok"] = run.is_ok
            layer = run.figures.first_out_of_line if run.figures else None
            record["first_layer_out_of_line"] = layer.name if layer else None
        as_json: dict[str, Any] = finite(content)
        return as_json
