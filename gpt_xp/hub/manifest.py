"""Record the verified files of a folder in `gpt-xp.json`, with their digests, sizes and times."""

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt_xp import json_text
from gpt_xp.hub.digests import DIGEST, digest_of

NAME = "gpt-xp.json"
_VERSION = 1


@dataclass(frozen=True)
class _VerifiedFile:
    digest: str
    n_bytes: int
    mtime_ns: int


class Manifest:
    """The record of the verified files in a folder.

    A record that is missing, damaged or of another version counts as empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = _read(folder / NAME)

    def knows(self, file: str) -> bool:
        """Return whether the file was once here and verified."""
        return file in self._entries

    def holds(self, file: str, *, rehash: bool = False) -> bool:
        """Return whether the file is here as it was verified.

        Its bytes are read only where its time has changed, or always with `rehash`. Raises `OSError`.
        """
        entry, path = self._entries.get(file), self.folder / file
        if entry is None or not path.is_file():
            return False
        now = path.stat()
        if now.st_size == entry.n_bytes and now.st_mtime_ns == entry.mtime_ns and not rehash:
            return True
        if now.st_size != entry.n_bytes or digest_of(path, entry.digest.partition(":")[0]) != entry.digest:
            return False
        if now.st_mtime_ns != entry.mtime_ns:
            with contextlib.suppress(OSError):  # In a read-only folder the file is hashed each time.
                self.record(file, entry.digest)
        return True

    def record(self, file: str, digest: str) -> None:
        """Record that the file, as it is now, has this digest. Raises `OSError`."""
        with (self.folder / file).open("rb+") as opened:
            os.fsync(opened.fileno())  # Otherwise a power cut could keep the record but lose the content.
            found = os.fstat(opened.fileno())
        self._entries[file] = _VerifiedFile(digest, found.st_size, found.st_mtime_ns)
        self._write()

    def discard(self, file: str) -> None:
        """Remove the file and its record. Raises `OSError`."""
        self._entries.pop(file, None)
        self._write()
        (self.folder / file).unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"version": _VERSION, "files": {file: asdict(entry) for file, entry in self._entries.items()}}
        temporary = self.folder / f".{NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / NAME)


def _read(path: Path) -> dict[str, _VerifiedFile]:
    try:
        if not path.is_file():  # Reading a pipe would never end.
            return {}
        content = json_text.parse(path.read_bytes())
        entries = {file: _VerifiedFile(**entry) for file, entry in content["files"].items()}
        digests_are_valid = all(re.fullmatch(DIGEST, each.digest) for each in entries.values())
        is_valid = content["version"] == _VERSION and digests_are_valid
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return entries if is_valid else {}
