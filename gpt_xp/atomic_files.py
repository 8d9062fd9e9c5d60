"""Writes files to a temporary name and renames them, so that a failure leaves the former file intact."""

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt_xp.errors import CheckpointError, SettingError
from gpt_xp.reporting.text import size

ASIDE_PREFIX = ".saving-"  # The names of temporary folders of `written_together` begin with it.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_aside(
    target: str | os.PathLike[str],
    n_bytes: int,
    fix: str = "check the permissions",
    put: Callable[[str, Any], object] | None = None,
) -> Iterator[str]:
    """Yield a temporary name beside `target` to write about `n_bytes` to; at the end, rename that file to `target`.

    Each call uses a different name, so two calls may write the same target at once. After a failure, the temporary
    file is removed. Raises `CheckpointError` if writing or renaming fails. `fix` says what to do if it is not allowed.
    `put(temporary, target)` may take the place of the renaming.
    """
    if _is_special(Path(target)):
        raise CheckpointError(f"cannot write {target}: it is no regular file, and a file would take its place")
    temporary = f"{os.fspath(target)}.{secrets.token_hex(4)}.part"
    try:
        yield temporary
        (put or os.replace)(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOENT and not Path(target).parent.is_dir():
            fix = f"there is no directory {Path(target).parent}: make it first"
        if error.errno in _NO_SPACE:
            fix = f"it needs {size(n_bytes)} there: make room and try again"
        raise CheckpointError(f"cannot write {target} ({error.strerror or error}); {fix}") from error
    finally:
        with suppress(OSError):  # The file was renamed, or was never created.
            os.remove(temporary)


def check_place(path: Path, what: str) -> None:
    """Raise `SettingError`, before anything is computed, where no file can be made at `path`. `what` is its content."""
    if path.is_dir():
        raise SettingError(f"{what} cannot be written to {path}: it is a directory")
    if _is_special(path):
        raise SettingError(
            f"{what} cannot be written to {path}: it is no regular file, and a file would take its place"
        )
    if not path.parent.is_dir():
        raise SettingError(f"{what} cannot be written to {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise SettingError(f"{what} cannot be written to {path}: no file may be made in {path.parent}")


def _is_special(path: Path) -> bool:
    """Return whether a path is a device or a pipe, such as /dev/null, which renaming would replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def written_together(directory: str | os.PathLike[str], first: str | None = None) -> Iterator[str]:
    """Yield a folder to write files to; at the end, move all of them to `directory`, which is created if needed.

    The file `first` is moved first. Raises `OSError`. Before the first move, all former files are still intact.
    """
    os.makedirs(directory, exist_ok=True)
    with TemporaryDirectory(prefix=ASIDE_PREFIX, dir=directory) as aside:
        yield aside
        for name in os.listdir(aside):
            sync(os.path.join(aside, name))
        for name in sorted(os.listdir(aside), key=lambda name: name != first):
            os.replace(os.path.join(aside, name), os.path.join(directory, name))


def sync(path: str) -> None:
    """Wait until a file is on the disk. Otherwise a power cut after the renaming could leave an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_json(path: str, entries: dict[str, Any]) -> None:
    """Write a JSON object, one entry on each line. Raises `OSError`."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=2, sort_keys=True)
        file.write("\n")
