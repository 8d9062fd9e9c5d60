"""Checks files before they are read: regular files, no Git LFS pointers, one JSON object of limited size."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

from gpt_xp import json_text
from gpt_xp.errors import CheckpointError, DeviceMemoryError, JsonError, ModelNotFoundError

_MAX_JSON_BYTES = 10_000_000  # Real configs and indexes have a few thousand bytes.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # The text that Git stores for a large file begins with it.
_NO_MAPPING = (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def reading(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Check that a directory exists, and convert errors of the system into errors that name the directory.

    Raises `ModelNotFoundError` if there is no such directory, `CheckpointError` if the body raises `OSError`, and
    `DeviceMemoryError` if it runs out of memory.
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
    """Raise a `CheckpointError` that names the file if its file system cannot map files into memory."""
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

    Raises `CheckpointError` for a directory, a pipe or a Git LFS pointer, and `OSError` as `open` does.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path} is not a regular file; a file of the checkpoint was expected there")
    with open(path, "rb") as file:
        if problem := lfs_problem(file.peek(len(_LFS_POINTER)), path):
            raise CheckpointError(problem)
        yield file


def lfs_problem(content: bytes, path: str | os.PathLike[str]) -> str | None:
    """Return the error message if a file that begins with `content` is a Git LFS pointer, else None."""
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
    """Return the JSON object in `text`. Raises `CheckpointError` for anything else, and for duplicate names."""
    try:
        value = json_text.parse(text, unique=True)
    except JsonError as error:
        raise CheckpointError(f"{path} holds malformed JSON ({error}); fetch or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object but {value!r:.80}; fetch or save it again")
    return value


def exists(path: str) -> bool:
    """Return whether `path` exists. Raises `OSError` if that cannot be found out."""
    # os.path.exists would also return False for a directory without search permission.
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _is_directory(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # A NUL in the name is a ValueError.
        return False
