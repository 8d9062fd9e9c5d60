"""Cut the input files of a job into shards, and read the lines of a shard.

A shard is a range of bytes of one file, and holds the lines that begin in it. So no process reads the input to find the
shards, and no process keeps a list of lines.
"""

import bisect
import gzip
import hashlib
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from gpt_xp.errors import TextError
from gpt_xp.jobs.inputs import BYTE_ORDER_MARK, MAX_LINE_BYTES, Input, field_message, set_by_option, text_fields
from gpt_xp.jobs.job import Job
from gpt_xp.prompt_lines import LineContent, is_object, parse_line

SEED_BITS = 52  # A reader that keeps JSON numbers as doubles keeps these seeds whole.


@dataclass(frozen=True)
class Shard:
    """A shard: its number in the job, the number of its file, and the bytes of the file that its lines begin in."""

    number: int
    file: int
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """The bytes of the input that it stands for."""
        return self.end - self.begin


@dataclass(frozen=True)
class Line:
    """A line that is not empty: the byte at which it begins in its text, the bytes of the file, and its content."""

    offset: int
    n_bytes: int
    content: LineContent


class Shards:
    """The shards of a job, by their number from 0. Numbers go on from file to file."""

    def __init__(self, job: Job) -> None:
        self.job = job
        counts = (1 if each.gzip else -(-each.size // job.shard_bytes) for each in job.inputs)
        self._ends = list(itertools.accumulate(counts))  # for each file, the number after its last shard

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(number)
        file = bisect.bisect_right(self._ends, number)
        if self.job.inputs[file].gzip:  # It can be read from its beginning only.
            return Shard(number, file, 0, self.job.inputs[file].size)
        begin = (number - (self._ends[file - 1] if file else 0)) * self.job.shard_bytes
        return Shard(number, file, begin, min(begin + self.job.shard_bytes, self.job.inputs[file].size))

    def lines(self, shard: Shard) -> Iterator[Line]:
        """Yield the lines of a shard. Raises `TextError` where the file cannot be read or has changed."""
        source = self.job.inputs[shard.file]
        try:
            with source.open() as stream:
                before = 0
                for offset, data, n_bytes in raw_lines(stream, shard.begin, None if source.gzip else shard.end):
                    read = n_bytes
                    if isinstance(stream, gzip.GzipFile):  # Progress counts the bytes of the compressed file.
                        before, read = stream.fileobj.tell(), stream.fileobj.tell() - before
                    yield Line(offset, read, _content(data, source, self.job.kind))
            source.check()  # A file that has changed while it was read may have given lines of both.
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise TextError(f"{source.path} cannot be read: {reason}") from None


def raw_lines(stream: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield offset, bytes and length of each line that begins in [begin, end) and is not empty.

    The bytes have no end of line. They are None for a line of more than `MAX_LINE_BYTES`.
    """
    if begin:  # The line that holds the byte before this range belongs to an earlier shard.
        stream.seek(begin - 1)
        begin += _skip_line(stream) - 1
    while end is None or begin < end:
        data: bytes | None = stream.readline(MAX_LINE_BYTES + 1)
        if not data:
            return
        n_bytes = len(data)
        if n_bytes > MAX_LINE_BYTES and not data.endswith(b"\n"):
            n_bytes, data = n_bytes + _skip_line(stream), None
        elif begin == 0:
            data = data.removeprefix(BYTE_ORDER_MARK)
        if data is None or data.strip():
            yield begin, None if data is None else data.removesuffix(b"\n").removesuffix(b"\r"), n_bytes
        begin += n_bytes


def line_seed(seed: int, file: int, offset: int) -> int:
    """Return the seed of a line: a hash of the job's seed, the number of the file, and the place of the line."""
    digest = hashlib.sha256(f"{seed} {file} {offset}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def line_number(source: Input, offset: int) -> int:
    """Return the number, from 1, of the line that begins at this byte of the text. This reads the file up to there."""
    with source.open() as stream:
        number, left = 1, offset
        while left and (data := stream.read(min(left, 1 << 20))):
            number += data.count(b"\n")
            left -= len(data)
    return number


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line, in pieces; return the number of bytes."""
    n_bytes = 0
    while data := stream.readline(1 << 20):
        n_bytes += len(data)
        if data.endswith(b"\n"):
            break
    return n_bytes


def _content(data: bytes | None, source: Input, kind: str) -> LineContent:
    if data is None:
        return LineContent(error=f"the line has more than {MAX_LINE_BYTES} bytes: make it shorter")
    content = parse_line(data, source.json, text_fields(kind), choices=kind == "choices")
    error = content.error
    if error is None and kind == "generate" and (field := set_by_option(content.input)):
        error = field_message(field)
    elif error is None and not source.json and is_object(str(content.text)):
        error = "the line is a JSON object, and the first line of the file is not: make all of them objects"
    return content if error is None else LineContent(content.text, content.input, content.choices, error)
