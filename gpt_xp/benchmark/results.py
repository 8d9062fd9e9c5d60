"""The records of a benchmark: what takes part, and what came out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt_xp.benchmark.figures import Turn, Workload, WorkloadFigures
from gpt_xp.tree import finite


@dataclass(frozen=True)
class ContenderSpec:
    """A contender that is to take part: its name, and the command that starts its process.

    The process speaks the protocol of `worker.py`. The floor is not a contender: it shows the limit of the machine, and
    the others are compared with it. `allowed` is the largest difference of its logits, relative to the largest logit;
    with None, the tolerance of its dtype is used.
    """

    name: str
    command: Sequence[str]
    is_floor: bool = False
    allowed: float | None = None


@dataclass(frozen=True)
class ContenderResult:
    """The result of one contender.

    `description` is its answer to "describe". `logits_difference` is the difference to the logits of the first
    contender in float32 or float64, relative to the largest of them. `cores` is the CPU time of a run divided by its
    wall time, the median of all runs. Where it is less than the threads, these waited, or other programs had the cores.

    `figures` and `turns` have an element for each workload. They are empty where the contender could not start
    (`skipped` says why) or was wrong (`failed`).
    """

    name: str
    is_floor: bool = False
    description: dict[str, Any] = field(default_factory=dict)
    logits_difference: float | None = None
    compile_seconds: float | None = None
    peak_memory_bytes: int | None = None
    cores: float | None = None
    figures: tuple[WorkloadFigures, ...] = ()
    turns: tuple[tuple[Turn, ...], ...] = ()
    skipped: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """The result of `bench`. `reference` is the name of the contender to which each `Phase.ratio` is taken."""

    title: str
    workloads: tuple[Workload, ...]
    rounds: int
    threads: int
    reference: str | None
    standings: tuple[ContenderResult, ...]
    environment: dict[str, Any]

    @property
    def is_ok(self) -> bool:
        """True if no contender failed, and at least one was measured."""
        measured = [each for each in self.standings if each.figures and not each.is_floor]
        return bool(measured) and not any(each.failed for each in self.standings)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold; numbers that are not finite become None."""
        content: dict[str, Any] = finite(dataclasses.asdict(self) | {"is_ok": self.is_ok})
        return content
