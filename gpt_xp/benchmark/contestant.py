"""One contender while the benchmark runs: its process, and what it has done so far."""

from typing import Any

import numpy as np

from gpt_xp.benchmark.figures import Turn, Workload, turn_of
from gpt_xp.benchmark.process import ContenderError, ContenderProcess
from gpt_xp.benchmark.results import ContenderSpec
from gpt_xp.comparison.figures import difference
from gpt_xp.tolerances import TOLERANCE


class Contestant:
    """A contender that takes part until it fails. Its process is started and ended elsewhere."""

    def __init__(self, spec: ContenderSpec, process: ContenderProcess) -> None:
        self.spec, self.process = spec, process
        self.description: dict[str, Any] = {}
        self.logits: np.ndarray[Any, Any] | None = None
        self.difference: float | None = None
        self.compile_seconds: float | None = None
        self.peak_memory_bytes: int | None = None
        self.cores: list[float] = []
        self.turns: list[list[Turn]] = []
        self.skipped: str | None = None
        self.failed: str | None = None

    @property
    def is_in(self) -> bool:
        """True if the contestant still takes part."""
        return self.skipped is None and self.failed is None

    @property
    def is_precise(self) -> bool:
        """True if the logits are precise enough as a reference for others."""
        return self.logits is not None and self.description["dtype"] in ("float32", "float64")

    def describe(self) -> None:
        """Receive the answer to "describe". The request was sent before, so that all processes start together."""
        try:
            self.description = self.process.receive()
        except ContenderError as error:
            self.skipped = str(error)
        else:
            if missing := {"name", "version", "device", "dtype"} - self.description.keys():
                self.skipped = f"it does not tell its {', '.join(sorted(missing))}"

    def compute_logits(self, tokens: list[int]) -> None:
        """Compute the logits after the last of `tokens`."""
        if (answer := self._ask("logits", tokens=tokens)) and answer["logits"] is not None:
            self.logits = np.asarray(answer["logits"], dtype=np.float64)

    def check_logits(self, reference: "Contestant") -> None:
        """Compare the logits with those of `reference`. A contender with wrong logits fails."""
        if self.logits is None or reference.logits is None:
            return
        if self.logits.shape != reference.logits.shape:
            self.failed = f"it has {self.logits.size} logits, where {reference.spec.name} has {reference.logits.size}"
            return
        self.difference = difference([self.logits], [reference.logits]).relative
        own = self.spec.allowed or TOLERANCE.get(("logits", self.description["dtype"]))
        if own is None:  # Quantized: the user judges whether the difference is too large.
            return
        allowed = max(own, TOLERANCE["logits", reference.description["dtype"]])
        if not self.difference <= allowed:
            self.failed = (
                f"its logits differ from those of {reference.spec.name} by {self.difference:.1e} of the largest "
                f"(allowed: {allowed:.0e})"
            )

    def warm_up(self, runs: list[tuple[list[list[int]], Workload]]) -> None:
        """Run each workload once with its prompts, which compiles what must be compiled."""
        for prompts, workload in runs:
            self.turns.append([])
            answer = self._ask("run", prompts=prompts, tokens=workload.n_new) or {}
            if answer.get("compile_seconds") is not None:
                self.compile_seconds = (self.compile_seconds or 0.0) + answer["compile_seconds"]

    def take_turn(self, index: int, prompts: list[list[int]], workload: Workload) -> None:
        """Run the workload with this `index` once, and keep the times."""
        if answer := self._ask("run", prompts=prompts, tokens=workload.n_new):
            if len(answer["seconds"]) == workload.n_new:
                self.turns[index].append(turn_of(answer["seconds"]))
                self.cores += [answer["cores"]] if "cores" in answer else []
            else:
                self.failed = f"it has timed {len(answer['seconds'])} tokens, and not {workload.n_new}"

    def note_memory(self) -> None:
        """Ask for the peak memory of the process."""
        if answer := self._ask("memory"):
            self.peak_memory_bytes = answer["peak_memory_bytes"]

    def _ask(self, do: str, **details: Any) -> dict[str, Any] | None:
        """Return the answer, or None where the contender has failed before or fails now."""
        try:
            return self.process.ask(do, **details) if self.is_in else None
        except ContenderError as error:
            self.failed = str(error)
            return None
