"""Downloads of one file for tests: pins, recorded progress, and the part file of a failed download."""

import hashlib
import os
import random
import socket
from pathlib import Path

import pytest
from servers import FileServer, git_sha1, reset, status

from gpt_xp.errors import DownloadError
from gpt_xp.hub.download import RemoteFile, download

CONTENT = random.Random(0).randbytes(100_003)
OTHER = random.Random(1).randbytes(100_003)
PATH = "/models/weights"
WEIGHTS = "/openai-community/gpt2/resolve/607a30d7/model.safetensors"
CONFIG = "/openai-community/gpt2/resolve/607a30d7/config.json"
BUCKET = "/gpt-2/models/124M/model.ckpt.data-00000-of-00001"
TOKEN = "hf_SeCrEt"


posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")


class Recorder:
    """A progress that records its calls."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int | None, int]] = []
        self.came, self.ends = 0, 0
        self.notes: list[str] = []

    def start(self, label: str, n_bytes: int | None, done: int) -> None:
        self.starts.append((label, n_bytes, done))

    def advance(self, n_bytes: int) -> None:
        self.came += n_bytes

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        self.ends += 1


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    if algorithm == "git-sha1":
        return f"git-sha1:{git_sha1(content)}"
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def remote(server: FileServer, path: str = PATH, **pins: object) -> RemoteFile:
    return RemoteFile(f"{server.url}{path}", "weights", **pins)


def pinned(server: FileServer, path: str = PATH, content: bytes = CONTENT) -> RemoteFile:
    return remote(server, path, n_bytes=len(content), digest=digest_of(content))


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def state_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.json")


def fetch(remote: RemoteFile, target: Path, content: bytes = CONTENT) -> Recorder:
    """Download, and check the file, the folder and the progress."""
    progress = Recorder()
    digest = download(remote, target, progress)
    assert target.read_bytes() == content
    assert digest == digest_of(content, digest.partition(":")[0])
    assert os.listdir(target.parent) == [target.name]
    assert progress.ends == 1
    return progress


def fails(remote: RemoteFile, target: Path, match: str) -> str:
    """Check that the download fails with one clear line, and leaves no file under the final name."""
    progress = Recorder()
    with pytest.raises(DownloadError, match=match) as caught:
        download(remote, target, progress)
    assert not target.exists()
    assert progress.ends == 1
    text = "\n".join([str(caught.value), *progress.notes])
    assert str(caught.value).isprintable()  # It is one line, without escape sequences from the server.
    for secret in ("Signature", "?", TOKEN, "\x1b"):
        assert secret not in text
    return str(caught.value)


def leave_part(server: FileServer, target: Path, after: int = 40_009, **pins: object) -> None:
    """Interrupt a download after this number of bytes, and forget the requests."""
    server.faults[PATH] = [reset(after), status(404)]
    fails(remote(server, **pins), target, "404")
    assert part_of(target).read_bytes() == CONTENT[:after]
    assert state_of(target).exists()
    server.forget()


def starts(server: FileServer, path: str = PATH) -> list[int | None]:
    """Return the first byte of each request for the file."""
    return [request.start for request in server.requests if request.path == path]


def refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}{PATH}"
