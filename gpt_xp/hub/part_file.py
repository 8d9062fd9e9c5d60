"""Keep a partly fetched file: its bytes in `NAME.part`, their ETag and digest in `NAME.part.json`.

A later process can continue where this one stopped.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from gpt_xp import json_text
from gpt_xp.hub.digests import DIGEST, READ_BYTES, Hash, algorithm_of

_VERSION = 1  # This is the format of NAME.part.json.


@dataclass(frozen=True)
class _State:
    """The content of NAME.part.json: which file the bytes belong to."""

    version: int = _VERSION
    etag: str | None = None  # The server that sent the bytes gave this strong ETag.
    digest: str | None = None  # This is the digest of the whole file.


class PartFile:
    """A file that is being fetched.

    `n_bytes` and `digest` are those of the whole file: the pinned ones, else those from a server, else None.
    `offset` is the number of bytes that are here. `etag` is the strong ETag of the server that sent them, or None.
    """

    def __init__(self, target: Path, n_bytes: int | None, digest: str | None) -> None:
        """Open or make the part of `target`; both values are pins, which never change. Raises `OSError`."""
        self._target = target
        self._part = target.with_name(f"{target.name}.part")
        self._state_file = target.with_name(f"{target.name}.part.json")
        self._pins = n_bytes, digest
        self.n_bytes, self.digest = self._pins
        self._hash: Hash | None = None
        target.parent.mkdir(parents=True, exist_ok=True)
        self._state = self._read_state()
        # The file is unbuffered, so that no received byte is lost if the process ends.
        self._file = FileIO(self._part, "r+b" if self._part.exists() else "w+b")
        self.offset = self._file.seek(0, os.SEEK_END)
        if not self.offset or self._state is None or (self.n_bytes is not None and self.offset > self.n_bytes):
            self.empty()

    def close(self) -> None:
        """Close the file. Remove it if it is empty."""
        self._file.close()
        if self._part.exists() and not self._part.stat().st_size:
            self._remove()

    @property
    def has_state(self) -> bool:
        """True if it is known which file the bytes belong to."""
        return self._state is not None

    @property
    def etag(self) -> str | None:
        """The strong ETag of the server that sent the bytes."""
        return self._state.etag if self._state else None

    @property
    def is_complete(self) -> bool:
        """True if all bytes have arrived, and their expected digest is known."""
        return self.n_bytes is not None and self.offset == self.n_bytes and self.digest is not None

    def begin(self, etag: str | None) -> None:
        """Record what a later process must know, before the first byte is written."""
        self._state = _State(etag=_strong(etag), digest=self.digest)
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self._state)), encoding="utf-8")
        os.replace(temporary, self._state_file)

    def write(self, block: bytes) -> None:
        """Append bytes. They must be hashed by `hash` too, perhaps at the same time in another thread."""
        view = memoryview(block)
        while view:
            written = self._file.write(view)
            self.offset += written
            view = view[written:]

    def hash(self) -> Hash:
        """Return the hash of the bytes that are here, by the algorithm of `digest`; they are read if need be."""
        algorithm = algorithm_of(self.digest or "sha256:")
        if self._hash is None or self._hash.algorithm != algorithm:
            self._hash = Hash(algorithm, self.n_bytes)
            self._file.seek(0)
            while block := self._file.read(READ_BYTES):
                self._hash.update(block)
        return self._hash

    def empty(self) -> None:
        """Begin again, and keep only the pins."""
        self._file.seek(0)
        if self.offset:  # Closing a truncated file is slow on ext4, which then waits for the disk.
            self._file.truncate()
        self.offset, self._hash, self._state = 0, None, None
        self.n_bytes, self.digest = self._pins

    def discard(self) -> None:
        """Close the file, and remove everything."""
        self._file.close()
        self._remove()

    def finish(self) -> None:
        """Close the file and rename it to its target."""
        self._file.close()
        os.replace(self._part, self._target)
        self._state_file.unlink(missing_ok=True)

    def _remove(self) -> None:
        self._part.unlink(missing_ok=True)
        self._state_file.unlink(missing_ok=True)

    def _read_state(self) -> _State | None:
        try:
            if not self._state_file.is_file():  # Reading a pipe would never end.
                return None
            state = _State(**json_text.parse(self._state_file.read_bytes()))
        except (OSError, ValueError, TypeError):  # It is absent, not JSON, or has other fields.
            return None
        if state.version != _VERSION or state.etag != _strong(state.etag):
            return None
        if not re.fullmatch(f"None|{DIGEST}", str(state.digest)) or state.digest != (self.digest or state.digest):
            return None
        self.digest = state.digest
        return state


def _strong(etag: str | None) -> str | None:
    """Return the ETag if it is one that If-Range can compare, else None."""
    return etag if re.fullmatch('"[!#-~]*"', str(etag)) else None
