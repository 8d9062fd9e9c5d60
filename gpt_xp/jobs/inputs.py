"""The input files of a job: what is known of each before its lines are read."""

import gzip
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from gpt_xp.errors import PromptError, SettingError, TextError
from gpt_xp.prompt_lines import holds_objects, parse_line

GZIP = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16  # bytes after the first line that decide whether lines are JSON
MAX_LINE_BYTES = 1 << 26  # A longer line has an error, so that memory is bounded.


@dataclass(frozen=True)
class Input:
    """An input file: its name as it was given, its path, its size and time, and what it holds."""

    file: str
    path: str
    size: int
    mtime_ns: int
    gzip: bool  # compressed
    json: bool  # JSON lines; otherwise each line is a text

    def open(self) -> BinaryIO:
        """Open the file for reading its text. Raises `TextError` where it is not what it was when the job began."""
        try:
            self.check()
            return cast(BinaryIO, gzip.open(self.path)) if self.gzip else open(self.path, "rb")
        except OSError as error:
            raise TextError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def check(self) -> None:
        """Raise `TextError` where the file is not what it was when the job began."""
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise TextError(f"{self.path} has changed since the job began: put it back, or begin another job")


def find_inputs(files: Sequence[str | os.PathLike[str]], kind: str) -> tuple[Input, ...]:
    """Return the files as inputs of a job of this kind.

    Raises `TextError` for a file that is missing, empty or unreadable, and `PromptError` for one that holds no lines of
    the right form.
    """
    if not files:
        raise SettingError("there is nothing to read: name the files of the job (inputs)")
    return tuple(_input(os.fspath(file), kind) for file in files)


def _input(file: str, kind: str) -> Input:
    if file == "-":
        raise TextError("a job cannot read stdin, because it may read a file again: write the lines to a file")
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise TextError(f"{file} is not a regular file: expected a file of lines")
        with open(file, "rb") as stream:
            is_gzip = stream.read(2) == GZIP
        with gzip.open(file) if is_gzip else open(file, "rb") as stream:
            first, rest, is_whole = _head(cast(BinaryIO, stream))
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise TextError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    names = text_fields(kind)
    is_json = holds_objects(file.removesuffix(".gz") if is_gzip else file, first + rest, is_whole, names)
    if kind == "choices" and not is_json:
        raise PromptError(f'{file} holds no JSON lines: expected an object with "prompt" and "choices" on each line')
    if is_json and kind == "generate" and (field := set_by_option(parse_line(first.strip(), True).input)):
        raise PromptError(f"{file}, the first line: {field_message(field)}")
    path = str(Path(file).absolute())
    return Input(file, path, status.st_size, status.st_mtime_ns, is_gzip, is_json)


def text_fields(kind: str) -> tuple[str, ...]:
    """Return the names that the text of a JSON line may have."""
    return ("text", "prompt") if kind == "score" else ("prompt",)


def set_by_option(fields: dict[str, object] | None) -> str | None:
    """Return the first field that has the name of an option of generation; None without one."""
    from gpt_xp.settings import GenerationOptions, StreamOptions

    known = {*GenerationOptions.__annotations__, *StreamOptions.__annotations__}
    return next((field for field in fields or () if field.replace("-", "_") in known), None)


def field_message(field: str) -> str:
    """Return the error of a line that has a field with the name of an option."""
    return f'"{field}" is the name of an option, and a line cannot set it: rename the field'


def _head(stream: BinaryIO) -> tuple[bytes, bytes, bool]:
    """Return the first line that is not empty, some of the rest, and whether that is the whole file."""
    first = stream.readline(MAX_LINE_BYTES).removeprefix(BYTE_ORDER_MARK)
    while first and not first.strip():
        first = stream.readline(MAX_LINE_BYTES)
    rest = stream.read(HEAD_BYTES)
    return first, rest, len(rest) < HEAD_BYTES
