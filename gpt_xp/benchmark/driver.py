"""Giving turns: every contender in a process of its own, one at a time, A B A B, and the figures of all."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt_xp.benchmark.figures import Figures, Turn, Workload, figures, turn_of
from gpt_xp.benchmark.machine import environment, usable_cores
from gpt_xp.benchmark.process import Worker, WorkerError
from gpt_xp.comparison.figures import difference
from gpt_xp.errors import SettingError
from gpt_xp.processes import thread_variables
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.tree import finite

# Seconds between turns. The threads of the last contender spin on for a while and take their cores from the next: those
# of OpenBLAS for 2**28 cycles, which is 0.1 s, and those of Intel's OpenMP for 0.2 s.
PAUSE = 0.25
CHECKED = 16  # tokens whose logits are compared
# JAX takes most of a GPU when it starts, and would leave nothing to the others.
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

Progress = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Entry:
    """A contender that is to take part: a name, and the command of a process that speaks `worker.py`'s protocol.

    The floor is no contender: it is what the machine can do, and the others are compared with it. `allowed` is how far
    its logits may be off, relative to the largest, where the tolerance of its dtype does not say.
    """

    name: str
    command: Sequence[str]
    is_floor: bool = False
    allowed: float | None = None


@dataclass(frozen=True)
class Standing:
    """What became of one entry.

    `description` is what it says of itself. `logits_difference` is to the logits of the first contender in float32 or
    float64, relative to the largest of them. `figures` and `turns` have an element for each workload, and none where
    `skipped` says why it could not begin, or `failed` what was wrong with it.
    """

    name: str
    is_floor: bool = False
    description: dict[str, Any] = field(default_factory=dict)
    logits_difference: float | None = None
    compile_seconds: float | None = None
    peak_memory_bytes: int | None = None
    figures: tuple[Figures, ...] = ()
    turns: tuple[tuple[Turn, ...], ...] = ()
    skipped: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """What `race` found. `reference` is the name of the contender that `Phase.ratio` is to."""

    title: str
    workloads: tuple[Workload, ...]
    rounds: int
    threads: int
    reference: str | None
    standings: tuple[Standing, ...]
    environment: dict[str, Any]

    @property
    def is_ok(self) -> bool:
        """Whether nothing went wrong, and at least one contender was measured."""
        measured = [each for each in self.standings if each.figures and not each.is_floor]
        return bool(measured) and not any(each.failed for each in self.standings)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold: numbers that are not finite become None."""
        content: dict[str, Any] = finite(dataclasses.asdict(self) | {"is_ok": self.is_ok})
        return content


def race(
    title: str,
    entries: Sequence[Entry],
    workloads: Sequence[Workload],
    n_vocab: int,
    *,
    rounds: int = 7,
    threads: int | None = None,
    reference: str | None = None,
    seed: int = 0,
    pause: float = PAUSE,
    progress: Progress = lambda what: contextlib.nullcontext(),
) -> Benchmark:
    """Measure all entries on all workloads, each in `rounds` turns, and return the figures.

    First the logits of all are compared, and who is outside the tolerance of its dtype takes no further part. Then
    each workload is run once by everyone, which compiles what there is to compile. Then, in each round and workload,
    everyone has one turn, in an order that rotates; the others wait. Prompts are random tokens, the same for all, and
    never the same twice.

    `threads` (None: as many as there are cores) is told to every process by the variables that libraries read.
    `reference` (None: the first that is not the floor) is who ratios are to. `progress` is entered with what is done.
    Raises `SettingError` where nothing is asked for; what goes wrong in a contender's process is in its `Standing`.
    """
    if not entries or not workloads or rounds < 1:
        raise SettingError("a benchmark needs a contender, a workload and a round")
    threads = threads or usable_cores()
    rng = np.random.default_rng(seed)

    def prompts(workload: Workload) -> list[list[int]]:
        tokens: list[list[int]] = rng.integers(0, n_vocab, (workload.batch, workload.context)).tolist()
        return tokens

    with contextlib.ExitStack() as stack:
        variables = MEMORY | thread_variables(threads)
        lanes = [_Lane(entry, stack.enter_context(Worker(entry.command, variables))) for entry in entries]
        with progress("starting"):
            _start(lanes, prompts(Workload(min(CHECKED, workloads[0].context)))[0])
        measured = any(not lane.entry.is_floor for lane in _taking_part(lanes))
        for lane in _taking_part(lanes) if measured else ():
            with progress(f"warming up {lane.entry.name}"):
                time.sleep(pause)
                lane.warm_up([(prompts(workload), workload) for workload in workloads])
        for number in range(rounds) if measured else ():
            with progress(f"round {number + 1} of {rounds}"):
                for place, workload in enumerate(workloads):
                    shared, first = prompts(workload), number % len(lanes)
                    for lane in _taking_part(lanes[first:] + lanes[:first]):
                        time.sleep(pause)
                        lane.take_turn(place, shared, workload)
        for lane in lanes:
            lane.note_memory()
    standings, name = _standings(lanes, workloads, reference)
    return Benchmark(title, tuple(workloads), rounds, threads, name, standings, environment())


class _Lane:
    """One entry while the race is on: its process, and what it has done so far."""

    def __init__(self, entry: Entry, worker: Worker) -> None:
        self.entry, self.worker = entry, worker
        self.description: dict[str, Any] = {}
        self.logits: np.ndarray[Any, Any] | None = None
        self.difference: float | None = None
        self.compile_seconds: float | None = None
        self.peak_memory_bytes: int | None = None
        self.turns: list[list[Turn]] = []
        self.skipped: str | None = None
        self.failed: str | None = None

    @property
    def is_in(self) -> bool:
        """Whether it still takes part."""
        return self.skipped is None and self.failed is None

    def describe(self) -> None:
        """Take the answer to "describe", which was sent already so that all can start together."""
        try:
            self.description = self.worker.receive()
        except WorkerError as error:
            self.skipped = str(error)
        else:
            if missing := {"name", "version", "device", "dtype"} - self.description.keys():
                self.skipped = f"it does not tell its {', '.join(sorted(missing))}"

    def compute_logits(self, tokens: list[int]) -> None:
        if (answer := self._ask("logits", tokens=tokens)) and answer["logits"] is not None:
            self.logits = np.asarray(answer["logits"], dtype=np.float64)

    def check_logits(self, reference: "_Lane") -> None:
        """Compare the logits, and take no further part with wrong ones."""
        if self.logits is None or reference.logits is None:
            return
        if self.logits.shape != reference.logits.shape:
            self.failed = f"it has {self.logits.size} logits, where {reference.entry.name} has {reference.logits.size}"
            return
        self.difference = difference([self.logits], [reference.logits]).relative
        own = self.entry.allowed or TOLERANCE.get(("logits", self.description["dtype"]))
        if own is None:  # quantized: how far off it is, is its user's to judge
            return
        allowed = max(own, TOLERANCE["logits", reference.description["dtype"]])
        if not self.difference <= allowed:
            self.failed = (
                f"its logits differ from those of {reference.entry.name} by {self.difference:.1e} of the largest "
                f"(allowed: {allowed:.0e})"
            )

    def warm_up(self, runs: list[tuple[list[list[int]], Workload]]) -> None:
        for prompts, workload in runs:
            self.turns.append([])
            answer = self._ask("run", prompts=prompts, tokens=workload.n_new) or {}
            if answer.get("compile_seconds") is not None:
                self.compile_seconds = (self.compile_seconds or 0.0) + answer["compile_seconds"]

    def take_turn(self, place: int, prompts: list[list[int]], workload: Workload) -> None:
        if answer := self._ask("run", prompts=prompts, tokens=workload.n_new):
            if len(answer["seconds"]) == workload.n_new:
                self.turns[place].append(turn_of(answer["seconds"]))
            else:
                self.failed = f"it has timed {len(answer['seconds'])} tokens, and not {workload.n_new}"

    def note_memory(self) -> None:
        if answer := self._ask("memory"):
            self.peak_memory_bytes = answer["peak_memory_bytes"]

    def _ask(self, do: str, **details: Any) -> dict[str, Any] | None:
        """Ask if it still takes part; an error ends that."""
        try:
            return self.worker.ask(do, **details) if self.is_in else None
        except WorkerError as error:
            self.failed = str(error)
            return None


def _taking_part(lanes: list[_Lane]) -> list[_Lane]:
    return [lane for lane in lanes if lane.is_in]


def _start(lanes: list[_Lane], tokens: list[int]) -> None:
    for lane in lanes:
        lane.worker.send("describe")
    for lane in lanes:
        lane.describe()
    for lane in lanes:
        lane.compute_logits(tokens)
    precise = (lane for lane in lanes if lane.logits is not None and _is_precise(lane))
    if reference := next(precise, None):
        for lane in lanes:
            if lane is not reference:
                lane.check_logits(reference)


def _is_precise(lane: _Lane) -> bool:
    return lane.description["dtype"] in ("float32", "float64")


def _standings(
    lanes: list[_Lane], workloads: Sequence[Workload], reference: str | None
) -> tuple[tuple[Standing, ...], str | None]:
    """Return the standings, and the name of the reference, or None where it has no turns."""
    fit = _taking_part(lanes)
    first = next((x for x in fit if not x.entry.is_floor and reference in (None, x.entry.name)), None)
    floor = next((lane for lane in fit if lane.entry.is_floor), None)
    return tuple(_standing(lane, workloads, first, floor) for lane in lanes), first.entry.name if first else None


def _standing(lane: _Lane, workloads: Sequence[Workload], first: _Lane | None, floor: _Lane | None) -> Standing:
    known = Standing(
        lane.entry.name, lane.entry.is_floor, lane.description, lane.difference, lane.compile_seconds,
        lane.peak_memory_bytes, skipped=lane.skipped, failed=lane.failed,
    )  # fmt: skip
    if not lane.is_in or first is None:
        return known
    beside = floor if lane.description["device"] == "cpu" else None  # the floor is the CPU's
    found = tuple(
        figures(turns, workload, first.turns[place], beside.turns[place] if beside else ())
        for place, (turns, workload) in enumerate(zip(lane.turns, workloads, strict=True))
    )
    return dataclasses.replace(known, figures=found, turns=tuple(map(tuple, lane.turns)))
