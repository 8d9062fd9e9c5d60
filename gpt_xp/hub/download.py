"""One file over HTTP into place: resumed after every break, verified, and only then under its own name.

What has come lies in `NAME.part`, and what is known of it in `NAME.part.json`, so that any later process goes on where
this one stopped. Requests are resumed as RFC 9110 has it (sections 13.1.5 If-Range, 14 Range requests). The Hub answers
with a redirect to a signed address that expires, on another host: each try therefore begins at the first address.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt_xp import json_text
from gpt_xp.errors import DownloadError
from gpt_xp.hub.digests import DIGEST, Hash, algorithm_of, content_md5, linked_digest
from gpt_xp.hub.url_safety import check_token, may_carry_token, origin, reason_of, redirected
from gpt_xp.reporting.text import size

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
FIRST_TRIES = 4  # before anything has come: is there a network at all?
TRIES = 10  # in a row without a new byte, once something has come
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; each wait is twice the one before

_VERSION = 1  # of the file beside a .part
_BLOCK = 1 << 20
_MAX_REDIRECTS = 8
_NUMBER = "[0-9]{1,18}"  # of bytes, as servers say it
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Remote:
    """A file on a server; `n_bytes` and `digest` ("sha256:...", "md5:...", "git-sha1:...") where they are pinned.

    `token` goes to the server of `url` alone.
    """

    url: str
    label: str
    n_bytes: int | None = None
    digest: str | None = None
    token: str | None = None


class Progress(Protocol):
    """Who is told how it goes."""

    def start(self, label: str, n_bytes: int | None, done: int) -> None:
        """Say that a file of `n_bytes` comes, of which `done` are here; again when it must begin anew."""

    def advance(self, n_bytes: int) -> None:
        """Say that so many bytes have come."""

    def note(self, text: str) -> None:
        """Say something in a line."""

    def end(self) -> None:
        """Say that this file is over, come or not."""


def download(remote: Remote, target: Path, progress: Progress, *, twice: bool = False) -> str:
    """Fetch `remote` into `target`; return the digest that it was found to have ("sha256:...").

    Size and digest are those of `remote`, else those that the server tells; without any, a sha256 is only computed.
    With `twice`, the disk must have room for a copy too. Raises `DownloadError`; what has come is kept for the next
    try, but for wrong bytes. Ctrl-C keeps it too.
    """
    import requests

    with _disk_errors(target), _Transfer(remote, target, twice, progress) as transfer:
        with requests.Session() as session:
            transfer.run(session)
        return transfer.finish()


class _BrokenError(Exception):
    """A try that failed, and that may go well another time; `wait` is how long the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class _State:
    """What is known of the bytes in a .part."""

    version: int = _VERSION
    etag: str | None = None  # strong, of the server that sent them
    digest: str | None = None  # of the whole file


class _Transfer:
    def __init__(self, remote: Remote, target: Path, twice: bool, progress: Progress) -> None:
        check_token(remote.token)
        self.remote, self.target, self.twice, self.progress = remote, target, twice, progress
        self.part = target.with_name(f"{target.name}.part")
        self.state_file = target.with_name(f"{target.name}.part.json")
        self.total, self.digest = remote.n_bytes, remote.digest
        self.ranges = True  # until the server turns out to count them wrongly
        self.hash: Hash | None = None

    def __enter__(self) -> "_Transfer":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.state = self._read_state()
        # Without a buffer of ours: what has come is in the file, whatever happens next.
        self.file = FileIO(self.part, "r+b" if self.part.exists() else "w+b")
        self.offset = self.file.seek(0, os.SEEK_END)
        if not self.offset or self.state is None or (self.total is not None and self.offset > self.total):
            self._empty()
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.progress.end()
        if self.part.exists() and not self.part.stat().st_size:
            self._discard()

    # --- tries ---

    def run(self, session: "requests.Session") -> None:
        """Try until the file is complete, or there is no sense in trying."""
        from requests import RequestException
        from urllib3.exceptions import HTTPError

        failures, begun = 0, False
        while not self._is_complete():
            offset = self.offset
            try:
                self._try(session)
            except (RequestException, HTTPError, _BrokenError) as error:
                begun = begun or self.offset > offset
                failures = 1 if self.offset > offset else failures + 1
                self._wait(error, failures, TRIES if begun else FIRST_TRIES)

    def _is_complete(self) -> bool:
        return self.total is not None and self.offset == self.total and self.digest is not None

    def _wait(self, error: Exception, failures: int, tries: int) -> None:
        """Before another try; or raise `DownloadError` where there should be none."""
        wait, final = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT), False
        if isinstance(error, _BrokenError):
            reason, wait = str(error), wait if error.wait is None else error.wait
        else:
            reason, final = reason_of(error)
        if wait > LONGEST_WAIT:
            reason, final = f"{reason}, and the server asks to wait {wait:.0f} s: try again then", True
        if final or failures >= tries:
            kept = f"; {self.offset} bytes are kept, and the next try goes on from there" if self.offset else ""
            raise self._error(reason + kept + ("" if final else "; try again later")) from None
        self.progress.note(f"{self.remote.label}: {reason}; trying again in {wait:g} s")
        time.sleep(wait)

    def _try(self, session: "requests.Session") -> None:
        with self._request(session) as (response, linked):
            status = response.status_code
            if status == 416:
                self._past_the_end(response)
            else:
                self._check_status(response)
                start, total = self._place(response)
                told = linked or content_md5(response.headers)
                self._check_pins(total, told)
                if start != self.offset:
                    self._empty()
                self._learn(total, told)
                self._prepare(response)
                self._receive(response)

    def _receive(self, response: "requests.Response") -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        assert self.hash is not None
        # Not iter_content: it waits for a whole block, and a reset of the connection would lose what had come of it.
        with ThreadPoolExecutor(1) as other:  # hash one block while the next is received and written
            hashed: Future[Any] = other.submit(bool)
            while block := response.raw.read1(_BLOCK, decode_content=False):
                self._check_room_in_file(len(block))
                self._write(block)
                hashed.result()
                hashed = other.submit(self.hash.update, block)
                self.progress.advance(len(block))
        if self.total is None:
            self.total = self.offset
        if self.offset < self.total:
            raise _BrokenError(f"the connection ended after {self.offset} of {self.total} bytes")
        self.digest = self.digest or self.hash.digest()

    def _check_room_in_file(self, n_bytes: int) -> None:
        """Before bytes are written that no check of the free space has counted."""
        if self.total is not None and self.offset + n_bytes > self.total:
            problem = f"the server sends more than the {self.total} bytes of the file; what had come was thrown away"
            self._empty()
            raise self._error(problem)

    def _write(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            written = self.file.write(view)
            self.offset += written
            view = view[written:]

    # --- requests and answers ---

    @contextlib.contextmanager
    def _request(self, session: "requests.Session") -> Iterator[tuple["requests.Response", str | None]]:
        """Ask for what is missing; the answer behind all redirects, and the digest that the first server linked."""
        from requests import RequestException

        url, linked = self.remote.url, None
        for _ in range(_MAX_REDIRECTS):
            auth = _bearer(self.remote.token) if may_carry_token(url, self.remote.url) else None
            try:
                response = session.get(
                    url, headers=self._headers(), auth=auth, stream=True, allow_redirects=False,
                    timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                )  # fmt: skip
            except RequestException:
                raise
            except ValueError:  # requests parses the Location of an answer also where it is not to follow it
                where = "HF_ENDPOINT" if url == self.remote.url else "the address that it redirects to"
                raise self._error(f"{where} is malformed, or the Location of its answer is") from None
            except OSError as error:  # of a file: the certificates that REQUESTS_CA_BUNDLE names
                raise self._error(f"the request could not be prepared ({error})") from None
            with response:
                if origin(url) == origin(self.remote.url):
                    linked = linked or linked_digest(response.headers.get("X-Linked-ETag"))
                if not response.is_redirect:
                    yield response, linked
                    return
            url = redirected(url, response.headers["Location"])
        raise self._error(f"more than {_MAX_REDIRECTS} redirects")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "gpt-xp"}
        if self.offset and self.ranges:
            if self.state and self.state.etag:
                headers["If-Range"] = self.state.etag
            elif self.digest is None:
                return headers  # nothing would tell if the rest belonged to another file
            headers["Range"] = f"bytes={self.offset}-"
        return headers

    def _check_status(self, response: "requests.Response") -> None:
        status = response.status_code
        redirected = origin(response.url) != origin(self.remote.url)
        if status in _TRY_AGAIN or (status == 403 and redirected):  # a signed address that has expired, perhaps
            raise _BrokenError(f"the server answered {_status(status)}", _retry_after(response))
        if status not in (200, 206):
            raise self._error(f"the server answered {_status(status)}{_HINTS.get(status, '')}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._error("the server, or a proxy, compresses the file though it was asked not to")

    def _place(self, response: "requests.Response") -> tuple[int, int | None]:
        """Where the bytes of this answer begin, and the size of the whole file."""
        if response.status_code == 200:
            length = response.headers.get("Content-Length", "")
            return 0, int(length) if re.fullmatch(_NUMBER, length) else None
        found = re.fullmatch(rf"bytes ({_NUMBER})-\d+/({_NUMBER}|\*)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != self.offset:
            self.ranges = False
            raise _BrokenError("the server sent another part of the file than it was asked for")
        return self.offset, None if found[2] == "*" else int(found[2])

    def _check_pins(self, total: int | None, told: str | None) -> None:
        """Compare what the server says of the file with what is pinned: before anything is fetched or given up."""
        pinned, digest = self.remote.n_bytes, self.remote.digest
        if pinned is not None and total not in (None, pinned):
            raise self._error(
                f"the server has {total} bytes under this name, and {pinned} were expected: see HF_ENDPOINT"
            )
        if digest and told and algorithm_of(told) == algorithm_of(digest) and told != digest:
            raise self._error(f"the server has another file under this name: {told}, not {digest}: see HF_ENDPOINT")

    def _learn(self, total: int | None, told: str | None) -> None:
        """Take from the server what is not pinned."""
        self.total = self.total if total is None else total
        if self.remote.digest is None and told and not (told.startswith("git") and self.total is None):
            if self.digest not in (None, told):
                self._empty()
                raise _BrokenError("the file has changed on the server")
            self.digest = told

    def _prepare(self, response: "requests.Response") -> None:
        """Before the first byte: is there room, what will be hashed, and what must a later process know?"""
        if self.total is not None:
            self._check_space(self.total - self.offset + self.twice * self.total)
        if not self.offset:
            self.state = _State(etag=_strong(response.headers.get("ETag")), digest=self.digest)
            self._write_state(self.state)
        self._hash_what_is_here()
        self.progress.start(self.remote.label, self.total, self.offset)

    def _past_the_end(self, response: "requests.Response") -> None:
        """What is here is the whole file, or more than it."""
        found = re.fullmatch(rf"bytes \*/({_NUMBER})", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != self.offset or self.state is None:
            self._empty()
            raise _BrokenError("the server has a shorter file than was here of it")
        self.total = self.offset
        self.digest = self.digest or self.state.digest
        self._hash_what_is_here()
        assert self.hash is not None
        self.digest = self.digest or self.hash.digest()

    # --- the files ---

    def finish(self) -> str:
        """Verify what has come, and give it its name."""
        self._hash_what_is_here()
        assert self.hash is not None
        assert self.digest is not None
        found = self.hash.digest()
        if found != self.digest or self.offset != self.total:
            self.file.close()
            self._discard()
            raise self._error(f"wrong bytes came ({found} instead of {self.digest}); they were thrown away. Try again")
        self.file.close()
        os.replace(self.part, self.target)
        self.state_file.unlink(missing_ok=True)
        return found

    def _hash_what_is_here(self) -> None:
        algorithm = algorithm_of(self.digest or "sha256:")
        if self.hash is not None and self.hash.algorithm == algorithm:
            return
        self.hash = Hash(algorithm, self.total)
        self.file.seek(0)
        while block := self.file.read(_BLOCK):
            self.hash.update(block)

    def _empty(self) -> None:
        """Begin anew."""
        self.file.seek(0)
        if self.offset:  # ext4 writes a file that was ever truncated to the disk when it is closed, and waits for that
            self.file.truncate()
        self.offset, self.hash, self.state = 0, None, None
        self.total, self.digest = self.remote.n_bytes, self.remote.digest

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)

    def _read_state(self) -> _State | None:
        try:
            if not self.state_file.is_file():  # a pipe would never end
                return None
            state = _State(**json_text.parse(self.state_file.read_bytes()))
        except (OSError, ValueError, TypeError):  # absent, no JSON, or with other fields
            return None
        is_ours = state.version == _VERSION and state.etag == _strong(state.etag)
        if (
            not is_ours
            or not re.fullmatch(f"None|{DIGEST}", str(state.digest))
            or state.digest != (self.digest or state.digest)
        ):
            return None
        self.digest = state.digest
        return state

    def _write_state(self, state: _State) -> None:
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(state)), encoding="utf-8")
        os.replace(temporary, self.state_file)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < needed:
            raise self._error(
                f"it needs {size(needed)} of disk space, and {self.target.parent} has {size(free)} free: free some, or "
                f"set GPT_XP_HOME to a folder on another disk"
            )

    def _error(self, problem: str) -> DownloadError:
        return DownloadError(f"cannot fetch {self.remote.label} from {origin(self.remote.url)[1]}: {problem}")


_HINTS = {
    401: ": it wants a token (HF_TOKEN), or does not know the one that it got",
    403: ": it does not let this address, or this token, have the file",
    404: ": it does not have the file",
}


def _status(code: int) -> str:
    # Not the words that the server sends: they end up on a terminal.
    return f"{code} {HTTPStatus(code).phrase}" if code in list(HTTPStatus) else str(code)


def _strong(etag: str | None) -> str | None:
    """The ETag, if it is one that If-Range can compare."""
    return etag if re.fullmatch('"[!#-~]*"', str(etag)) else None


def _retry_after(response: "requests.Response") -> float | None:
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _bearer(token: str | None) -> Any:
    """As `auth`, and not as a header, which requests would let the user's .netrc replace."""

    def authorize(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize if token else None


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    from requests import RequestException

    try:
        yield
    except RequestException:  # which requests makes an OSError too
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space; what has come is kept" if full else "it must be a folder that can be written to"
        raise DownloadError(
            f"cannot write {target.name} in {target.parent}: {error.strerror or error}: {fix}, or set GPT_XP_HOME to "
            f"another folder"
        ) from error
