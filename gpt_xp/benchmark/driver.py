"""Give turns: each contender in its own process, one at a time, A B A B; and return the figures of all."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from gpt_xp.benchmark.contestant import Contestant
from gpt_xp.benchmark.figures import Workload, workload_figures
from gpt_xp.benchmark.machine import describe_machine, usable_cores
from gpt_xp.benchmark.process import ContenderProcess
from gpt_xp.benchmark.results import Benchmark, ContenderResult, ContenderSpec
from gpt_xp.errors import SettingError
from gpt_xp.processes import JAX_VARIABLES, StageProgress, no_stage_progress, thread_variables

# Seconds between turns. The threads of the last contender go on spinning, and would take cores from the next one: those
# of OpenBLAS for 2**28 cycles, which is 0.1 s, and those of Intel's OpenMP for 0.2 s.
PAUSE = 0.25
CHECKED_TOKENS = 16  # prompt tokens after which logits are compared


def run_benchmark(
    title: str,
    specs: Sequence[ContenderSpec],
    workloads: Sequence[Workload],
    n_vocab: int,
    *,
    rounds: int = 7,
    threads: int | None = None,
    reference: str | None = None,
    seed: int = 0,
    pause: float = PAUSE,
    progress: StageProgress = no_stage_progress,
) -> Benchmark:
    """Measure all contenders on all workloads, each in `rounds` turns, and return a `Benchmark`.

    First the logits of all are compared. A contender outside the tolerance of its dtype takes no further part. Then
    each contender runs each workload once, which compiles what must be compiled. Then each has one turn in each round
    and workload, in an order that rotates, while the others wait. Prompts are random tokens, the same for all
    contenders, and different in each turn.

    `threads` (None: the number of cores) is set for every process by the variables that libraries read. Ratios are to
    the contender called `reference` (None: the first that is not the floor). `progress` is entered with the name of
    each stage. The failure of a contender's process is in its `ContenderResult`. Raises `SettingError` where there is
    no contender, workload, round or such reference.
    """
    if not specs or not workloads or rounds < 1:
        raise SettingError("a benchmark needs a contender, a workload and a round")
    names = [spec.name for spec in specs if not spec.is_floor]
    if reference is not None and reference not in names:
        raise SettingError(f"there is no contender {reference!r} for ratios; there are: {', '.join(names)}")
    threads = threads or usable_cores()
    rng = np.random.default_rng(seed)

    def prompts(workload: Workload) -> list[list[int]]:
        tokens: list[list[int]] = rng.integers(0, n_vocab, (workload.batch, workload.context)).tolist()
        return tokens

    with contextlib.ExitStack() as stack:
        variables = JAX_VARIABLES | thread_variables(threads)
        contestants = [
            Contestant(spec, stack.enter_context(ContenderProcess(spec.command, variables))) for spec in specs
        ]
        with progress("starting"):
            _start(contestants, prompts(Workload(min(CHECKED_TOKENS, workloads[0].context)))[0])
        if any(not each.spec.is_floor for each in _taking_part(contestants)):
            for contestant in _taking_part(contestants):
                with progress(f"warming up {contestant.spec.name}"):
                    time.sleep(pause)
                    contestant.warm_up([(prompts(workload), workload) for workload in workloads])
            for number in range(rounds):
                with progress(f"round {number + 1} of {rounds}"):
                    for index, workload in enumerate(workloads):
                        shared, first = prompts(workload), number % len(contestants)
                        for contestant in _taking_part(contestants[first:] + contestants[:first]):
                            time.sleep(pause)
                            contestant.take_turn(index, shared, workload)
        for contestant in contestants:
            contestant.note_memory()
    results, name = _results(contestants, workloads, reference)
    return Benchmark(title, tuple(workloads), rounds, threads, name, results, describe_machine())


def _taking_part(contestants: list[Contestant]) -> list[Contestant]:
    return [each for each in contestants if each.is_in]


def _start(contestants: list[Contestant], tokens: list[int]) -> None:
    """Start all processes together, and compare their logits after `tokens`."""
    for each in contestants:
        each.process.send("describe")
    for each in contestants:
        each.describe()
    for each in contestants:
        each.compute_logits(tokens)
    if reference := next((each for each in contestants if each.is_precise), None):
        for each in contestants:
            if each is not reference:
                each.check_logits(reference)


def _results(
    contestants: list[Contestant], workloads: Sequence[Workload], reference: str | None
) -> tuple[tuple[ContenderResult, ...], str | None]:
    """Return the results, and the name of the reference, or None where it has no turns."""
    fit = _taking_part(contestants)
    first = next((each for each in fit if not each.spec.is_floor and reference in (None, each.spec.name)), None)
    floor = next((each for each in fit if each.spec.is_floor), None)
    return tuple(_result(each, workloads, first, floor) for each in contestants), first.spec.name if first else None


def _result(
    contestant: Contestant, workloads: Sequence[Workload], first: Contestant | None, floor: Contestant | None
) -> ContenderResult:
    known = ContenderResult(
        contestant.spec.name, contestant.spec.is_floor, contestant.description, contestant.difference,
        contestant.compile_seconds, contestant.peak_memory_bytes,
        statistics.median(contestant.cores) if contestant.cores else None,
        skipped=contestant.skipped, failed=contestant.failed,
    )  # fmt: skip
    if not contestant.is_in or first is None:
        return known
    compared = floor if contestant.description["device"] == "cpu" else None  # The floor is measured on the CPU.
    found = tuple(
        workload_figures(turns, workload, first.turns[index], compared.turns[index] if compared else ())
        for index, (turns, workload) in enumerate(zip(contestant.turns, workloads, strict=True))
    )
    return dataclasses.replace(known, figures=found, turns=tuple(map(tuple, contestant.turns)))
