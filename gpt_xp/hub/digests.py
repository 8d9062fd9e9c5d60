"""Compute digests of files, and read those that servers send: "sha256:...", "md5:..." or "git-sha1:..."."""

import hashlib
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20  # bytes of a block
DIGEST = "sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}|git-sha1:[0-9a-f]{40}"  # This is a regular expression.


def algorithm_of(digest: str) -> str:
    """Return the name that a digest begins with."""
    return digest.partition(":")[0]


def linked_digest(etag: str | None) -> str | None:
    """Return the digest in an X-Linked-ETag: the Hub sends a sha256 for large files, and git's sha1 for small ones."""
    value = (etag or "").removeprefix("W/").strip('"').lower()
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return f"sha256:{value}"
    return f"git-sha1:{value}" if re.fullmatch(r"[0-9a-f]{40}", value) else None


def content_md5(headers: Any) -> str | None:
    """Return the digest of the whole file from the headers of a storage server, or None."""
    # For a range, Content-MD5 is the digest of the range. Azure sends the digest of the whole file in its own header.
    value = headers.get("x-ms-blob-content-md5") or ("Content-Range" not in headers and headers.get("Content-MD5"))
    try:
        digest = b64decode(value or "", validate=True)
    except ValueError:
        return None
    return f"md5:{digest.hex()}" if len(digest) == 16 else None


class Hash:
    """A hash of the algorithm that a digest begins with. git hashes the size of a file before its bytes."""

    def __init__(self, algorithm: str, n_bytes: int | None) -> None:
        self.algorithm = algorithm
        self._hash: Any = hashlib.new("sha1" if algorithm == "git-sha1" else algorithm, usedforsecurity=False)
        if algorithm == "git-sha1":
            self._hash.update(b"blob %d\0" % (n_bytes or 0))
        self.update = self._hash.update

    def digest(self) -> str:
        """Return the digest of the bytes hashed so far."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Return the digest of a file, such as "sha256:...". Raises `OSError`."""
    hash = Hash(algorithm, path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            hash.update(block)
    return hash.digest()
