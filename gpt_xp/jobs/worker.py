"""Compute one shard: read its lines, compute their records in batches, write them aside, and rename the file."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_xp.atomic_files import written_aside
from gpt_xp.errors import CheckpointError, GptXpError, PromptError
from gpt_xp.hub.find import find_model
from gpt_xp.jobs.job import Job, model_digest, model_stamp, read_job, sync_folder
from gpt_xp.jobs.parts import MAX_ATTEMPTS, Parts
from gpt_xp.jobs.shards import Line, Shard, Shards, line_number, line_seed
from gpt_xp.jobs.tasks import Outcome, Record, Task
from gpt_xp.jobs.writers import open_writer
from gpt_xp.loading import load
from gpt_xp.model import Model
from gpt_xp.registry import get_backend

WINDOW = 1024  # lines that are read, sorted and computed before their records are written
DEADLY = "the shard of this line ended its worker three times, so the line was not computed"

Advance = Callable[[int, int], object]  # called with a number of prompts that are done, and of their bytes


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a worker. No text depends on them, so they may change while a job is under way."""

    out: str
    folder: str  # the model's directory
    run: str  # the id of this run of the job, for counting attempts
    backend: str | None = None
    device: str | None = None
    mesh: str | None = None
    threads: int | None = None
    offline: bool = False
    batch_size: int = 8
    strict: bool = False
    stamp: str = ""  # `model_stamp` of that directory when the job's model was hashed


@dataclass(frozen=True)
class ShardResult:
    """The result of a shard. `how` is "computed", "there" (another worker was first) or "given up"."""

    number: int
    how: str
    prompts: int = 0


class Worker:
    """Computes shards of a job, one after another, with one model."""

    def __init__(self, options: WorkerOptions) -> None:
        """Load the model. Raises the errors of `gpt_xp.load`."""
        self._options, out = options, Path(options.out)
        self._job = read_job(out)
        self._shards, self._parts = Shards(self._job), Parts(out, self._job.format)
        self._task = Task(self._job, load_model(self._job, options), options.batch_size)

    def run(self, number: int, advance: Advance = lambda prompts, n_bytes: None) -> ShardResult:
        """Compute a shard, unless it is done.

        Where it ended its worker three times in this run, each line gets an error record. Raises `PromptError` with
        `strict` for the first line with an error, `TextError`, `CheckpointError`, and the errors of the model.
        """
        parts = self._parts
        if parts.is_done(number):
            return ShardResult(number, "there")
        attempts = parts.begin_attempt(number, self._options.run)
        if attempts > 2 * MAX_ATTEMPTS:
            raise PromptError(f"shard {number} ends its worker even when it is only read: take its lines out")
        give_up = attempts >= MAX_ATTEMPTS
        prompts = self._write(self._shards[number], give_up, advance)
        parts.end_attempts(number)
        return ShardResult(number, "given up" if give_up else "computed", prompts)

    def _write(self, shard: Shard, give_up: bool, advance: Advance) -> int:
        """Write the records of a shard; return the number of its lines."""
        job, part = self._job, self._parts.part(shard.number)
        prompts = errors = 0

        def put(aside: str, part: Path) -> None:
            self._parts.put(aside, shard.number, errors)

        try:
            with written_aside(part, shard.n_bytes, put=put) as aside, open_writer(aside, job) as writer:
                for lines, outcomes in self._windows(shard, give_up, advance):
                    writer.write(self._records(shard, lines, outcomes))
                    prompts += len(lines)
                    errors += sum(isinstance(outcome, GptXpError) for outcome in outcomes)
        except CheckpointError:
            if not part.exists():  # Otherwise another worker was first, and has removed our file.
                raise
        sync_folder(part.parent)
        return prompts

    def _windows(self, shard: Shard, give_up: bool, advance: Advance) -> Iterator[tuple[list[Line], list[Outcome]]]:
        """Yield the lines of a shard, a limited number at a time, with their outcomes in the same order."""
        each = self._shards.lines(shard)
        while lines := list(itertools.islice(each, WINDOW)):
            outcomes: list[Outcome] = [PromptError(line.content.error or DEADLY) for line in lines]
            wrong = [place for place, line in enumerate(lines) if line.content.error is not None or give_up]
            self._refuse(shard, lines, outcomes, wrong)
            advance(len(wrong), sum(lines[place].n_bytes for place in wrong))
            if not give_up:
                seeds = [line_seed(self._job.seed, shard.file, line.offset) for line in lines]
                for place, outcome in self._task.outcomes(lines, seeds):
                    outcomes[place] = outcome
                    if isinstance(outcome, GptXpError):
                        self._refuse(shard, lines, outcomes, [place])
                    advance(1, lines[place].n_bytes)
            yield lines, outcomes

    def _refuse(self, shard: Shard, lines: list[Line], outcomes: list[Outcome], wrong: list[int]) -> None:
        """Raise the first error with `strict`."""
        if self._options.strict and wrong:
            source, offset = self._job.inputs[shard.file], lines[wrong[0]].offset
            raise PromptError(f"{source.file}, line {line_number(source, offset)}: {outcomes[wrong[0]]}")

    def _records(self, shard: Shard, lines: list[Line], outcomes: list[Outcome]) -> Iterator[Record]:
        name = "text" if self._job.kind == "score" else "prompt"
        for line, outcome in zip(lines, outcomes, strict=True):
            content = line.content
            source: dict[str, Any] = {"file": self._job.inputs[shard.file].file, "offset": line.offset}
            source |= {name: content.text} | ({} if content.input is None else {"input": content.input})
            if isinstance(outcome, GptXpError):
                yield {"type": "error", **source, "error": str(outcome)}
            else:
                yield from ({"type": "result", **source, **fields} for fields in outcome)


def load_model(job: Job, options: WorkerOptions) -> Model:
    """Load the model of a job. Raises `CheckpointError` where that directory holds another model by now or here."""
    here = os.path.isdir(options.folder)
    folder = Path(options.folder) if here else find_model(job.model, offline=options.offline)
    if model_stamp(folder) != options.stamp and model_digest(folder) != job.digest:
        raise CheckpointError(f"{folder} is another model than that of the job: put that model there")
    backend = get_backend(
        options.backend, device=options.device, dtype=job.dtype, threads=options.threads, mesh=options.mesh
    )
    backend.keep_compiled()
    return load(folder, backend=backend, quantize=job.quantize, dtype=job.dtype)
