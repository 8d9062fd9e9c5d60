"""Files that are checked before they are read: regular, no pointer of Git LFS, one JSON object of a sane size."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

from gpt_xp import json_text
from gpt_xp.errors import CheckpointError, DeviceMemoryError, JsonError, ModelNotFoundError

_MAX_JSON_BYTES = 10_000_000  # real configs and indexes have a few thousand
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # Git stores a text that begins so in place of a large file
_NO_MAPPING = (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def reading(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Check that a directory is there, then turn errors of the machine into errors that name the directory.

    Raises `ModelNotFoundError` where there is no such directory, `CheckpointError` where the body raises `OSError`, and
    `DeviceMemoryError` where it runs out of memory.
    """
    try:
        if not _is_directory(directory):
            raise ModelNotFoundError(f"{str(directory)!r} is no directory; a checkpoint's directory was expected")
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {directory} ({error}); check the files and their permissions") from error
    except MemoryError as error:
        raise DeviceMemoryError(f"not enough memory to read {directory} ({error}); try a smaller dtype") from error


@contextmanager
def mapping_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `CheckpointError`, which names the file, where its file system cannot map files into memory."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_MAPPING:
            raise
        raise CheckpointError(
            f"{path} is on a file system that cannot map files into memory ({error.strerror}); copy its directory to a "
            f"local disk, and use the copy"
        ) from error


@contextmanager
def open_regular(path: str) -> Iterator[BufferedReader]:
    """Open a regular file for reading bytes.

    Raises `CheckpointError` for a directory, a pipe and a pointer of Git LFS, and `OSError` as `open` does.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path} is not a regular file; a file of the checkpoint was expected there")
    with open(path, "rb") as file:
        if problem := lfs_problem(file.peek(len(_LFS_POINTER)), path):
            raise CheckpointError(problem)
        yield file


def lfs_problem(content: bytes, path: str | os.PathLike[str]) -> str | None:
    """Return the error message if a file that begins with `content` is a pointer of Git LFS, else None."""
    if not content.startswith(_LFS_POINTER):
        return None
    return f"{path} is only a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository"


def read_json(path: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CheckpointError` for anything else, `OSError` as `open` does."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is larger than {_MAX_JSON_BYTES} bytes, which no such file is; fetch it again"
            )
        return parse_json(file.read(), path)


def parse_json(text: bytes, path: str) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises `CheckpointError` for anything else, and for a name that comes twice."""
    try:
        value = json_text.parse(text, unique=True)
    except JsonError as error:
        raise CheckpointError(f"{path} holds malformed JSON ({error}); fetch or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object but {value!r:.80}; fetch or save it again")
    return value


def exists(path: str) -> bool:
    """Return whether there is something at `path`. Raises `OSError` where that cannot be known."""
    # os.path.exists would also say no for a directory that may not be searched.
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _is_directory(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
