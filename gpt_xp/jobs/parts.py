"""The files of a job's directory: a part for each shard, and what is known of it.

`000/part-000012.jsonl` has the records of shard 12. It is written aside and renamed, so a part that is there is done.
Beside it, `part-000012.errors` has the number of its error records, and `part-000012.attempts` a line for each attempt
that has not ended.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gpt_xp.atomic_files import sync
from gpt_xp.errors import CheckpointError
from gpt_xp.jobs.writers import count_errors

PER_FOLDER = 1000
MAX_ATTEMPTS = 3


class Parts:
    """The files of the shards in a job's directory `out`, with parts of this `format`."""

    def __init__(self, out: Path, format: str) -> None:
        self.out, self.format = out, format
        self._name = re.compile(rf"part-(\d+)\.({format}|errors)")

    def part(self, number: int) -> Path:
        """Return the path of a shard's records."""
        return self._path(number, self.format)

    def is_done(self, number: int) -> bool:
        """Return whether the records of a shard are there."""
        return self.part(number).exists()

    def scan(self) -> tuple[set[int], dict[int, int]]:
        """Return the numbers of the shards that are done, and the error records of those that have some."""
        done, with_errors = set(), []
        for name in self._names():
            if match := self._name.fullmatch(name):
                if match[2] == "errors":
                    with_errors.append(int(match[1]))
                else:
                    done.add(int(match[1]))
        return done, {number: self._n_errors(number) for number in sorted(with_errors) if number in done}

    def put(self, aside: str, number: int, n_errors: int) -> None:
        """Make a finished file the part of a shard, unless another worker was first."""
        part = self.part(number)
        self.write_errors(number, n_errors)
        try:
            os.link(
                aside, part
            )  # Unlike a renaming, this replaces no part. One with errors must not replace a good one.
        except FileExistsError:
            self.write_errors(number, count_errors(part, self.format))
        except OSError:  # The file system has no hard links.
            os.replace(aside, part)

    def write_errors(self, number: int, count: int) -> None:
        """Keep the number of error records of a shard whose part is about to be renamed."""
        path = self._path(number, "errors")
        if count:
            path.write_text(f"{count}\n")
            sync(str(path))
        else:
            path.unlink(missing_ok=True)

    def begin_attempt(self, number: int, run: str) -> int:
        """Note that a worker of this run begins a shard; return how many have begun it before, and not ended."""
        path = self._path(number, "attempts")
        try:
            path.parent.mkdir(exist_ok=True)
            before = self.n_attempts(number, run)
            with path.open("a") as file:
                file.write(f"{run}\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path} ({error.strerror or error}); make room, or check the permissions"
            ) from error
        return before

    def n_attempts(self, number: int, run: str) -> int:
        """Return how many workers of this run have begun a shard, and not ended it."""
        try:
            return self._path(number, "attempts").read_text().split().count(run)
        except FileNotFoundError:
            return 0

    def end_attempts(self, number: int) -> None:
        """Forget the attempts of a shard, which is done."""
        self._path(number, "attempts").unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove the files that killed workers have left. Call it when all shards are done."""
        for folder in self._folders():
            for name in os.listdir(folder):
                if name.endswith((".part", ".attempts")):
                    with suppress(OSError):  # Another process has removed it.
                        os.remove(folder / name)

    def _path(self, number: int, suffix: str) -> Path:
        return self.out / f"{number // PER_FOLDER:03d}" / f"part-{number:06d}.{suffix}"

    def _n_errors(self, number: int) -> int:
        try:
            return int(self._path(number, "errors").read_text())
        except (OSError, ValueError):
            return 1  # The file was damaged, and its name says that there are some.

    def _folders(self) -> list[Path]:
        try:
            return sorted(each for each in self.out.iterdir() if re.fullmatch(r"\d{3,}", each.name) and each.is_dir())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.out} ({error.strerror}); check the permissions") from None

    def _names(self) -> Iterator[str]:
        for folder in self._folders():
            yield from os.listdir(folder)


def blocks_of(parts: Parts, n_shards: int) -> Iterator[bytes]:
    """Yield the records of all shards as bytes, in the order of the input."""
    for number in range(n_shards):
        with parts.part(number).open("rb") as file:
            while block := file.read(1 << 20):
                yield block
