"""Say how far a job has come, and join its parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt_xp.errors import CheckpointError, SettingError
from gpt_xp.jobs.job import Job, read_job
from gpt_xp.jobs.parts import Parts, blocks_of
from gpt_xp.jobs.shards import Shards


@dataclass(frozen=True)
class BulkStatus:
    """The state of a bulk job, or of a slice of it.

    `done` of `shards` shards are done, which stand for `done_bytes` of `bytes` of the input. `errors` maps the path of
    each part with error records to their number. `prompts` counts the prompts that this call has done.
    """

    directory: Path
    shards: int
    done: int
    bytes: int
    done_bytes: int
    errors: dict[str, int]
    prompts: int = 0

    @property
    def n_errors(self) -> int:
        """The number of error records."""
        return sum(self.errors.values())

    @property
    def is_complete(self) -> bool:
        """Whether all shards are done."""
        return self.done == self.shards


def numbers_of(n_shards: int, slice: str | None = None, from_end: bool = False) -> range:
    """Return the numbers of the shards of a slice, such as "3/64": the third of 64.

    Raises `SettingError` for a slice that does not exist.
    """
    first, step = 0, 1
    if slice is not None:
        part, slash, of = str(slice).partition("/")
        if not (slash and part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of)):
            raise SettingError(f"slice must be K/N, with K from 1 to N, such as 3/64, not {slice!r}")
        first, step = int(part) - 1, int(of)
    numbers = range(first, n_shards, step)
    return numbers[::-1] if from_end else numbers


def status_of(out: Path, job: Job, numbers: range, prompts: int = 0) -> BulkStatus:
    """Return the state of the shards with these numbers."""
    shards, parts = Shards(job), Parts(out, job.format)
    done, errors = parts.scan()
    return BulkStatus(
        directory=out,
        shards=len(numbers),
        done=sum(number in done for number in numbers),
        bytes=sum(shards[number].n_bytes for number in numbers),
        done_bytes=sum(shards[number].n_bytes for number in numbers if number in done),
        errors={str(parts.part(number)): count for number, count in errors.items() if number in numbers},
        prompts=prompts,
    )


def status(out: str | Path) -> BulkStatus:
    """Return the state of the job in `out`. Raises `SettingError` where there is none."""
    job = read_job(Path(out))
    return status_of(Path(out), job, range(len(Shards(job))))


def join(out: str | Path) -> Iterator[bytes]:
    """Return the records of all shards as pieces of JSON lines, in the order of the input.

    Raises `CheckpointError` where shards are missing, and `SettingError` for a job with parts in parquet.
    """
    found = status(out)
    job = read_job(Path(out))
    if job.format == "parquet":
        raise SettingError(
            f"the parts of {out} are parquet, which is not joined as text: read all of them in order with "
            f'pyarrow.dataset.dataset("{out}", exclude_invalid_files=True)'
        )
    if not found.is_complete:
        raise CheckpointError(
            f"{found.shards - found.done} of {found.shards} shards are missing in {out}: run the same command again, "
            "which goes on"
        )
    return blocks_of(Parts(Path(out), job.format), found.shards)
