"""Fetch one file over HTTP. Resume it after every break, verify it, and only then rename it to its target.

Requests are resumed as RFC 9110 says (sections 13.1.5 If-Range, 14 Range requests). The Hub answers with a redirect to
a signed address that expires, on another host. So each try begins at the first address.
"""

import contextlib
import errno
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_xp.errors import DownloadError
from gpt_xp.hub import answers
from gpt_xp.hub.digests import READ_BYTES, algorithm_of, content_md5, linked_digest
from gpt_xp.hub.part_file import PartFile
from gpt_xp.hub.progress import DownloadProgress
from gpt_xp.hub.url_safety import bearer, check_token, may_carry_token, origin, reason_of, redirected
from gpt_xp.reporting.text import size

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
FIRST_TRIES = 4  # Before the first byte there are few tries, because there may be no network.
TRIES = 10  # After the first byte, this many tries in a row may bring nothing new.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries, doubled each time
_MAX_REDIRECTS = 8


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with its `n_bytes` and `digest` ("sha256:...") where they are pinned.

    A digest may also be "md5:..." or "git-sha1:...". `token` is sent only to the server of `url`.
    """

    url: str
    label: str
    n_bytes: int | None = None
    digest: str | None = None
    token: str | None = None


def download(remote: RemoteFile, target: Path, progress: DownloadProgress, *, room_for_copy: bool = False) -> str:
    """Fetch `remote` into `target`, and return the digest of its bytes ("sha256:...").

    Size and digest must be those of `remote`, or else those from the server. Without either, a sha256 is only computed.
    With `room_for_copy`, the disk must have room for the file twice. Raises `DownloadError`. The bytes that arrived
    are kept for the next try, unless they are wrong. Ctrl-C keeps them too.
    """
    import requests

    check_token(remote.token)
    with _disk_errors(target), contextlib.closing(PartFile(target, remote.n_bytes, remote.digest)) as part:
        try:
            with requests.Session() as session:
                transfer = _Transfer(remote, target, part, room_for_copy, progress)
                transfer.run(session)
            return transfer.finish()
        finally:
            progress.end()


class _BrokenError(Exception):
    """A try that failed and may succeed later. `wait` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Transfer:
    """The requests for one file, which fill its part."""

    def __init__(
        self, remote: RemoteFile, target: Path, part: PartFile, room_for_copy: bool, progress: DownloadProgress
    ) -> None:
        self.remote, self.target, self.part = remote, target, part
        self.room_for_copy, self.progress = room_for_copy, progress
        self.ranges = True  # It becomes False when the server sends a wrong range.

    # --- tries ---

    def run(self, session: "requests.Session") -> None:
        """Try until the file is complete. Raises `DownloadError` where another try makes no sense."""
        from requests import RequestException
        from urllib3.exceptions import HTTPError

        failures, begun = 0, False
        while not self.part.is_complete:
            offset = self.part.offset
            try:
                self._try(session)
            except (RequestException, HTTPError, _BrokenError) as error:
                begun = begun or self.part.offset > offset
                failures = 1 if self.part.offset > offset else failures + 1
                self._wait(error, failures, TRIES if begun else FIRST_TRIES)

    def _wait(self, error: Exception, failures: int, tries: int) -> None:
        """Wait before another try. Raises `DownloadError` where there should be none."""
        wait, final = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT), False
        if isinstance(error, _BrokenError):
            reason, wait = str(error), wait if error.wait is None else error.wait
        else:
            reason, final = reason_of(error)
        if wait > LONGEST_WAIT:
            reason, final = f"{reason}, and the server asks to wait {wait:.0f} s: try again then", True
        if final or failures >= tries:
            offset = self.part.offset
            kept = f"; {offset} bytes are kept, and the next try goes on from there" if offset else ""
            raise self._error(reason + kept + ("" if final else "; try again later")) from None
        self.progress.note(f"{self.remote.label}: {reason}; trying again in {wait:g} s")
        time.sleep(wait)

    def _try(self, session: "requests.Session") -> None:
        with self._request(session) as (response, linked):
            if response.status_code == 416:
                self._past_the_end(response)
            else:
                self._check_status(response)
                start, n_bytes = self._place(response)
                told = linked or content_md5(response.headers)
                self._check_pins(n_bytes, told)
                if start != self.part.offset:
                    self.part.empty()
                self._learn(n_bytes, told)
                self._prepare(response)
                self._receive(response)

    def _receive(self, response: "requests.Response") -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        part, hash = self.part, self.part.hash()
        # iter_content would wait for a whole block. A reset of the connection would lose an incomplete one.
        with ThreadPoolExecutor(1) as other:  # It hashes a block while the next one is received.
            hashed: Future[Any] = other.submit(bool)
            while block := response.raw.read1(READ_BYTES, decode_content=False):
                self._check_size(len(block))
                part.write(block)
                hashed.result()
                hashed = other.submit(hash.update, block)
                self.progress.advance(len(block))
        if part.n_bytes is None:
            part.n_bytes = part.offset
        if part.offset < part.n_bytes:
            raise _BrokenError(f"the connection ended after {part.offset} of {part.n_bytes} bytes")
        part.digest = part.digest or hash.digest()

    def _check_size(self, n_bytes: int) -> None:
        """Raise `DownloadError` before bytes beyond the size of the file are written."""
        if self.part.n_bytes is not None and self.part.offset + n_bytes > self.part.n_bytes:
            problem = f"the server sends more than the {self.part.n_bytes} bytes of the file"
            self.part.empty()
            raise self._error(f"{problem}; what had come was thrown away")

    # --- requests and answers ---

    @contextlib.contextmanager
    def _request(self, session: "requests.Session") -> Iterator[tuple["requests.Response", str | None]]:
        """Ask for the missing bytes, and yield the answer after all redirects and the first server's digest.

        The digest is None where the server sent none.
        """
        from requests import RequestException

        url, linked = self.remote.url, None
        for _ in range(_MAX_REDIRECTS):
            auth = bearer(self.remote.token) if may_carry_token(url, self.remote.url) else None
            try:
                response = session.get(
                    url, headers=self._headers(), auth=auth, stream=True, allow_redirects=False,
                    timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                )  # fmt: skip
            except RequestException:
                raise
            except ValueError:  # requests parses each Location, even with allow_redirects=False.
                where = "HF_ENDPOINT" if url == self.remote.url else "the address that it redirects to"
                raise self._error(f"{where} is malformed, or the Location of its answer is") from None
            except OSError as error:  # The certificates in REQUESTS_CA_BUNDLE may be missing.
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
        if self.part.offset and self.ranges:
            if self.part.etag:
                headers["If-Range"] = self.part.etag
            elif self.part.digest is None:
                return headers  # The rest could belong to another file, without any sign of it.
            headers["Range"] = f"bytes={self.part.offset}-"
        return headers

    def _check_status(self, response: "requests.Response") -> None:
        status = response.status_code
        if answers.is_worth_another_try(status, origin(response.url) != origin(self.remote.url)):
            raise _BrokenError(f"the server answered {answers.describe_status(status)}", answers.retry_after(response))
        if status not in (200, 206):
            raise self._error(f"the server answered {answers.describe_status(status)}{answers.hint_for(status)}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._error("the server, or a proxy, compresses the file though it was asked not to")

    def _place(self, response: "requests.Response") -> tuple[int, int | None]:
        """Return where the bytes of this answer begin, and the size of the whole file."""
        if response.status_code == 200:
            return 0, answers.content_length(response)
        start, n_bytes = answers.content_range(response)
        if start is None or start != self.part.offset:
            self.ranges = False
            raise _BrokenError("the server sent another part of the file than it was asked for")
        return start, n_bytes

    def _check_pins(self, n_bytes: int | None, told: str | None) -> None:
        """Compare what the server says of the file with the pins, before anything is fetched or removed."""
        pinned, digest = self.remote.n_bytes, self.remote.digest
        if pinned is not None and n_bytes not in (None, pinned):
            raise self._error(
                f"the server has {n_bytes} bytes under this name, and {pinned} were expected: see HF_ENDPOINT"
            )
        if digest and told and algorithm_of(told) == algorithm_of(digest) and told != digest:
            raise self._error(f"the server has another file under this name: {told}, not {digest}: see HF_ENDPOINT")

    def _learn(self, n_bytes: int | None, told: str | None) -> None:
        """Take the size and the digest from the server where they are not pinned."""
        part = self.part
        part.n_bytes = part.n_bytes if n_bytes is None else n_bytes
        if self.remote.digest is None and told and not (told.startswith("git") and part.n_bytes is None):
            if part.digest not in (None, told):
                part.empty()
                raise _BrokenError("the file has changed on the server")
            part.digest = told

    def _prepare(self, response: "requests.Response") -> None:
        """Check the free space, and record what a later process must know, before the first byte."""
        part = self.part
        if part.n_bytes is not None:
            self._check_space(part.n_bytes - part.offset + self.room_for_copy * part.n_bytes)
        if not part.offset:
            part.begin(response.headers.get("ETag"))
        part.hash()  # The bytes that are here are hashed before a bar is shown.
        self.progress.start(self.remote.label, part.n_bytes, part.offset)

    def _past_the_end(self, response: "requests.Response") -> None:
        """Handle an answer 416: the part is the whole file, or longer than it."""
        part = self.part
        if answers.unsatisfied_range_size(response) != part.offset or not part.has_state:
            part.empty()
            raise _BrokenError("the server has a shorter file than was here of it")
        part.n_bytes = part.offset
        part.digest = part.digest or part.hash().digest()

    # --- the end ---

    def finish(self) -> str:
        """Verify the file, rename it, and return its digest. Wrong bytes are removed, and raise `DownloadError`."""
        part = self.part
        found = part.hash().digest()
        if found != part.digest or part.offset != part.n_bytes:
            wanted = part.digest
            part.discard()
            raise self._error(f"wrong bytes came ({found} instead of {wanted}); they were thrown away. Try again")
        part.finish()
        return found

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < needed:
            raise self._error(
                f"it needs {size(needed)} of disk space, and {self.target.parent} has {size(free)} free: free some, or "
                f"set GPT_XP_HOME to a folder on another disk"
            )

    def _error(self, problem: str) -> DownloadError:
        return DownloadError(f"cannot fetch {self.remote.label} from {origin(self.remote.url)[1]}: {problem}")


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of the disk into `DownloadError`."""
    from requests import RequestException

    try:
        yield
    except RequestException:  # It is an OSError too, but not one of the disk.
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space; what has come is kept" if is_full else "it must be a folder that can be written to"
        raise DownloadError(
            f"cannot write {target.name} in {target.parent}: {error.strerror or error}: {fix}, or set GPT_XP_HOME to "
            f"another folder"
        ) from error
