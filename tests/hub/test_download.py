"""Downloads from servers that fail in every way known: the right bytes under the name, or none and one clear line."""

import base64
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from commands import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import (
    BucketServer,
    FileServer,
    HubServer,
    change,
    compressed,
    framed,
    garbage,
    git_sha1,
    headers,
    late,
    no_ranges,
    redirect,
    reset,
    stall,
    status,
    truncate,
)

import gpt_xp.hub.download as module
from gpt_xp.errors import DownloadError
from gpt_xp.hub import part_file
from gpt_xp.hub.download import RemoteFile, download

CONTENT = random.Random(0).randbytes(100_003)
OTHER = random.Random(1).randbytes(100_003)
PATH = "/models/weights"
WEIGHTS = "/openai-community/gpt2/resolve/607a30d7/model.safetensors"
CONFIG = "/openai-community/gpt2/resolve/607a30d7/config.json"
BUCKET = "/gpt-2/models/124M/model.ckpt.data-00000-of-00001"
TOKEN = "hf_SeCrEt"
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")

# Downloads as a process of its own, which can be killed: URL, target, size, sha256.
CHILD = """
import sys
from pathlib import Path
from gpt_xp.hub.download import RemoteFile, download
from gpt_xp.errors import DownloadError
from gpt_xp.hub.progress import StderrProgress
url, target, n_bytes, digest, limit = sys.argv[1:]
if limit != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download(RemoteFile(url, "weights", int(n_bytes), digest), Path(target), StderrProgress())
except DownloadError as error:
    sys.exit(f"DownloadError: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


class Recorder:
    """The progress as it was told."""

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


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds waited between tries, which take no time here."""
    waits: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    return waits


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "NETRC":
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({PATH: CONTENT}) as server:
        yield server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({WEIGHTS: CONTENT, CONFIG: b'{"n_layer": 2}'}) as hub:
        yield hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights"


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
    """Download, and see that the file is right, that nothing is left over, and that the progress was told of it."""
    progress = Recorder()
    digest = download(remote, target, progress)
    assert target.read_bytes() == content
    assert digest == digest_of(content, digest.partition(":")[0])
    assert os.listdir(target.parent) == [target.name]
    assert progress.ends == 1
    return progress


def fails(remote: RemoteFile, target: Path, match: str) -> str:
    """Fail with one clear line, and leave nothing under the final name."""
    progress = Recorder()
    with pytest.raises(DownloadError, match=match) as caught:
        download(remote, target, progress)
    assert not target.exists()
    assert progress.ends == 1
    text = "\n".join([str(caught.value), *progress.notes])
    assert str(caught.value).isprintable()  # one line, and no colours that a server has thought of
    for secret in ("Signature", "?", TOKEN, "\x1b"):
        assert secret not in text
    return str(caught.value)


def leave_part(server: FileServer, target: Path, after: int = 40_009, **pins: object) -> None:
    """Break a download off after so many bytes, and forget the requests: now comes another process."""
    server.faults[PATH] = [reset(after), status(404)]
    fails(remote(server, **pins), target, "404")
    assert part_of(target).read_bytes() == CONTENT[:after]
    assert state_of(target).exists()
    server.forget()


def starts(server: FileServer, path: str = PATH) -> list[int | None]:
    """Where each request for the file began."""
    return [request.start for request in server.requests if request.path == path]


# --- a whole file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "git-sha1"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_file_comes_whole(server, target, algorithm, framing):
    server.always[PATH] = framed(framing)
    digest = digest_of(CONTENT, algorithm)
    progress = Recorder()
    assert download(remote(server, n_bytes=len(CONTENT), digest=digest), target, progress) == digest
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == [target.name]
    (request,) = server.requests
    assert request.headers["Accept-Encoding"] == "identity"
    assert not {"Range", "If-Range", "Authorization"} & set(request.headers)
    assert progress.starts == [("weights", len(CONTENT), 0)]
    assert (progress.came, progress.ends, progress.notes) == (len(CONTENT), 1, [])


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("content", [CONTENT, b"", b"x"])
def test_without_pins_a_sha256_is_computed(server, target, framing, content):
    server.files[PATH] = content
    server.always[PATH] = framed(framing)
    progress = Recorder()
    assert download(remote(server), target, progress) == digest_of(content)
    assert target.read_bytes() == content
    assert progress.starts == [("weights", len(content) if framing == "length" else None, 0)]


def test_an_empty_file_of_git(server, target):
    server.files[PATH] = b""
    fetch(replace(pinned(server, content=b""), digest=digest_of(b"", "git-sha1")), target, b"")


def test_a_file_that_is_there_is_replaced_at_the_end(server, target):
    target.parent.mkdir()
    target.write_bytes(b"old")
    server.faults[PATH] = [truncate(5), status(404)]
    with pytest.raises(DownloadError, match="404"):
        download(pinned(server), target, Recorder())
    assert target.read_bytes() == b"old"
    fetch(pinned(server), target)


# --- broken connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("fault", [reset, truncate, stall])
def test_a_break_is_resumed_and_no_byte_comes_twice(monkeypatch, server, target, fault, is_pinned, framing):
    monkeypatch.setattr(module, "READ_TIMEOUT", 0.3)
    server.faults[PATH] = [[fault(40_009), framed(framing)], [fault(0), framed(framing)], fault(30_011)]
    progress = fetch(pinned(server) if is_pinned else remote(server), target)
    assert starts(server) == [None, 40_009, 40_009, 70_020]
    assert server.sent(PATH) == progress.came == len(CONTENT)
    etag = f'"{server.etag(CONTENT)}"'
    assert [request.headers["If-Range"] for request in server.requests] == [None, etag, etag, etag]
    assert [done for _, _, done in progress.starts] == [0, 40_009, 40_009, 70_020]


def test_a_body_without_length_that_is_cut_is_noticed_by_the_pin(server, target):
    server.faults[PATH] = [[framed("close"), truncate(40_009)]]
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]


@settings(max_examples=40, deadline=None)
@given(
    n_bytes=st.integers(0, 5003),
    breaks=st.lists(st.tuples(st.integers(0, 2003), st.sampled_from([reset, truncate])), max_size=7),
    seed=st.integers(0, 999),
    is_pinned=st.booleans(),
)
def test_any_breaks_end_with_the_right_file_and_no_byte_twice(n_bytes, breaks, seed, is_pinned):
    content = random.Random(seed).randbytes(n_bytes)
    with tempfile.TemporaryDirectory() as folder, FileServer({PATH: content}) as server:
        server.faults[PATH] = [fault(after) for after, fault in breaks]
        wanted = pinned(server, content=content) if is_pinned else remote(server)
        file = Path(folder, "file")
        for _ in range(1 + len(breaks) // module.FIRST_TRIES):  # several breaks without a byte end a download
            with contextlib.suppress(DownloadError):
                if not file.exists():
                    download(wanted, file, Recorder())
        assert file.read_bytes() == content
        assert server.sent(PATH) == n_bytes


def test_tries_end_where_nothing_comes(server, target, waits):
    server.always[PATH] = status(503)
    fails(pinned(server), target, "the server answered 503 Service Unavailable; try again later$")
    assert len(server.requests) == module.FIRST_TRIES
    assert waits == [0.5, 1, 2]
    server.always.clear()
    fetch(pinned(server), target)


def test_tries_are_more_where_something_came(server, target, waits):
    server.faults[PATH] = [reset(7)] + [status(500)] * module.TRIES
    fails(pinned(server), target, "500 Internal Server Error; 7 bytes are kept, and the next try goes on from there")
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    fetch(pinned(server), target)
    assert server.sent(PATH) == len(CONTENT)


def test_tries_count_anew_with_each_new_byte(server, target, waits):
    server.faults[PATH] = [fault for _ in range(13) for fault in (status(500), reset(5), status(500))]
    fetch(pinned(server), target)
    assert max(waits) == 2
    assert server.sent(PATH) == len(CONTENT)


# --- no connection --------------------------------------------------------------------------------------------------


def refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}{PATH}"


def test_a_refused_connection(server, target):
    message = fails(replace(pinned(server), url=refused_url()), target, "the connection was refused; try again later$")
    assert message.startswith("cannot fetch weights from 127.0.0.1: ")
    fetch(pinned(server), target)


def test_no_such_host(monkeypatch, server, target):
    def nowhere(*args: object, **settings: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", nowhere)
        wanted = replace(pinned(server), url="https://nonexistent.invalid/weights")
        fails(wanted, target, "nonexistent.invalid: there is no such host, or no network; try again later$")
    fetch(pinned(server), target)


@pytest.mark.parametrize("fault", [late(), stall(0)])
def test_a_server_that_does_not_answer(monkeypatch, server, target, fault):
    server.always[PATH] = fault
    with monkeypatch.context() as patch:
        patch.setattr(module, "READ_TIMEOUT", 0.1)
        fails(pinned(server), target, "the server did not answer in time; try again later$")
    server.always.clear()
    fetch(pinned(server), target)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue of connections answers at once")
def test_a_connection_that_is_not_taken(monkeypatch, server, target):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as first:
        first.connect(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        fails(replace(pinned(server), url=url), target, "the server did not answer in time; try again later$")
    fetch(pinned(server), target)


def test_a_certificate_that_is_not_trusted_is_final(monkeypatch, server, target):
    calls = []

    def send(self: object, request: requests.PreparedRequest, **settings: object) -> None:
        calls.append(request)
        raise requests.exceptions.SSLError(
            ssl.SSLCertVerificationError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed")
        )

    with monkeypatch.context() as patch:
        patch.setattr(requests.Session, "send", send)
        fails(replace(pinned(server), url="https://models.test/?q=1"), target, "certificate cannot be verified")
    assert len(calls) == 1
    fetch(pinned(server), target)


def test_a_proxy_is_used_and_its_password_not_shown(monkeypatch, target):
    url = "http://models.test/weights"
    with FileServer({url: CONTENT}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        fetch(RemoteFile(url, "weights", token=TOKEN), target)
        assert not proxy.sees(TOKEN)
        target.unlink()
        monkeypatch.setenv("HTTP_PROXY", refused_url().replace("//", "//me:pass-word@"))
        assert "pass" not in fails(RemoteFile(url, "weights"), target, "the proxy cannot be reached, or refuses")


# --- what servers answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 451, 501, 304, 302, 204, 299, 599])
def test_some_answers_are_final(server, target, code):
    server.faults[PATH] = [status(code, body=b"" if code in (204, 304) else b"\x1b[31mno")]
    fails(pinned(server), target, f"127.0.0.1: the server answered {code}")
    assert len(server.requests) == 1
    fetch(pinned(server), target)


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_some_answers_are_worth_another_try(server, target, code, waits):
    server.faults[PATH] = [status(code), [reset(11), framed("length")], status(code)]
    progress = fetch(pinned(server), target)
    assert starts(server) == [None, None, 11, 11]
    assert str(code) in progress.notes[0]
    assert waits == [0.5, 0.5, 1]


def test_retry_after_is_obeyed(server, target, waits):
    date = formatdate(time.time() + 10, usegmt=True)
    values = ["7", "0", date, formatdate(0, usegmt=True), "soon"]
    server.always[PATH] = lambda server, request, answer: answer
    for value in values:
        server.faults[PATH] = [status(429, {"Retry-After": value})]
        fetch(pinned(server), target)
    assert waits[:2] == [7, 0]
    assert 5 < waits[2] < 10.5
    assert waits[3:] == [0, 0.5]


@pytest.mark.parametrize("code", [429, 503])
def test_a_long_retry_after_is_an_error_that_says_so(server, target, waits, code):
    server.faults[PATH] = [reset(11), status(code, {"Retry-After": "3607"})]
    fails(pinned(server), target, f"{code} .* wait 3607 s: try again then; 11 bytes are kept")
    assert waits == [0.5]
    fetch(pinned(server), target)
    assert server.sent(PATH) == len(CONTENT)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed_at_each_try(server, target, code):
    server.always["/a"] = redirect("b?x=1", code)
    server.always["/b"] = redirect(f"{server.url}{PATH}", code)
    server.faults[PATH] = [reset(40_009)]
    fetch(replace(pinned(server), url=f"{server.url}/a"), target)
    assert [request.path for request in server.requests] == ["/a", "/b", PATH] * 2
    assert server.sent(PATH) == len(CONTENT)


def test_a_loop_of_redirects_ends(server, target):
    server.faults[PATH] = [redirect(PATH)] * 8
    fails(pinned(server), target, "more than 8 redirects")
    server.faults.clear()
    fetch(pinned(server), target)


@pytest.mark.parametrize(
    "to",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "//[", "http://a:99999/x", "http://127.0.0.1:99999/x", "http://.."],
)
def test_a_redirect_that_leads_nowhere(server, target, to):
    server.faults[PATH] = [redirect(to)] * 4
    fails(replace(pinned(server), token=TOKEN), target, "redirects|malformed|no address|another host")
    server.faults.clear()
    fetch(pinned(server), target)


def test_a_server_without_ranges(server, target):
    server.always[PATH] = no_ranges()
    server.faults[PATH] = [reset(40_009)]
    progress = fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]
    assert progress.starts[-1] == ("weights", len(CONTENT), 0)


@pytest.mark.parametrize(
    "place", [None, "", "bytes */100003", "bytes 40008-100002/100003", "bytes 0-100002/100003", "items 40009-5/9",
              "bytes 40009-100002/" + "9" * 5000]
)  # fmt: skip
def test_a_part_that_was_not_asked_for_is_not_used(server, target, place):
    server.faults[PATH] = [reset(40_009), headers({"Content-Range": place})]
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009, None]


def test_a_length_that_is_no_number_is_none(server, target):
    server.faults[PATH] = [[framed("close"), headers({"Content-Length": "9" * 5000})]]
    fetch(remote(server), target)


def test_ranges_in_slices(server, target):
    def slices(server, request, answer):
        end = (request.start or 0) + 30_011 - 1
        if request.start is None or end >= len(CONTENT):
            return answer
        changed = {**answer.headers, "Content-Range": f"bytes {request.start}-{end}/{len(CONTENT)}"}
        return replace(answer, headers=changed, body=answer.body[:30_011])

    server.always[PATH] = slices
    server.faults[PATH] = [truncate(7)]
    fetch(pinned(server), target)
    assert starts(server) == [None, 7, 30_018, 60_029, 90_040]


def test_a_compressed_answer_is_refused(server, target):
    server.faults[PATH] = [compressed()]
    fails(pinned(server), target, "compresses the file though it was asked not to")
    fetch(pinned(server), target)


# --- the right bytes? -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "git-sha1"])
def test_wrong_bytes_are_thrown_away(server, target, algorithm):
    server.faults[PATH] = [garbage()]
    wanted = replace(pinned(server), digest=digest_of(CONTENT, algorithm))
    fails(wanted, target, f"wrong bytes came .*{algorithm}.*thrown away")
    assert os.listdir(target.parent) == []
    fetch(wanted, target)


def test_wrong_bytes_after_a_break_are_thrown_away(server, target):
    server.faults[PATH] = [reset(40_009), garbage()]
    fails(pinned(server), target, "wrong bytes came")
    fetch(pinned(server), target)


@pytest.mark.parametrize("n_bytes", [1, 100_002, 100_004])
def test_another_size_than_the_pinned_one_is_refused_before_a_byte_is_written(monkeypatch, server, target, n_bytes):
    monkeypatch.setattr(part_file, "FileIO", _NeverWritten)
    fails(replace(pinned(server), n_bytes=n_bytes), target, f"has 100003 bytes .* and {n_bytes} were expected")
    assert os.listdir(target.parent) == []


def test_another_linked_digest_than_the_pinned_one_is_refused_before_a_byte_is_written(monkeypatch, hub, target):
    monkeypatch.setattr(part_file, "FileIO", _NeverWritten)
    fails(replace(pinned(hub, WEIGHTS), digest=digest_of(OTHER)), target, "another file under this name")
    assert os.listdir(target.parent) == []


class _NeverWritten(FileIO):
    def write(self, data: object) -> int:
        raise AssertionError


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_more_bytes_than_the_pinned_size_are_an_error_and_not_written_on_and_on(server, target, framing):
    server.files[PATH] = CONTENT + bytes(30_000_000)
    server.faults[PATH] = [framed(framing)] * 99
    fails(pinned(server), target, "bytes")
    assert sum(request.sent for request in server.requests) < 20_000_000
    assert not part_of(target).exists()


def test_a_file_that_changes_between_two_tries_is_refused_where_it_is_pinned(server, target):
    server.faults[PATH] = [reset(40_009), change(OTHER)]
    fails(pinned(server), target, "wrong bytes came")
    server.files[PATH] = CONTENT
    fetch(pinned(server), target)


@pytest.mark.parametrize("other", [OTHER, OTHER[:70_001], OTHER[:30_011], OTHER + OTHER, b""])
@pytest.mark.parametrize("etag", ["strong", "weak", None])
def test_a_file_that_changes_between_two_tries_begins_anew(server, target, other, etag):
    if etag != "strong":
        server.always[PATH] = headers({"ETag": etag and 'W/"1"'})
    server.faults[PATH] = [reset(40_009), change(other)]
    fetch(remote(server), target, other)
    assert starts(server) == [None, 40_009 if etag == "strong" else None]


@pytest.mark.parametrize("other", [OTHER, OTHER[:70_001], OTHER[:30_011]])
@pytest.mark.parametrize("has_etag", [True, False])
def test_a_file_that_changes_on_the_hub_begins_anew(hub, target, other, has_etag):
    if not has_etag:  # then the linked digest alone tells
        hub.cdn.always[WEIGHTS] = headers({"ETag": None})
    hub.cdn.faults[WEIGHTS] = [reset(40_009)]
    hub.faults[WEIGHTS] = [lambda server, request, answer: answer, change(other)]
    assert fetch(remote(hub, WEIGHTS), target, other).starts[-1] == ("weights", len(other), 0)


def test_a_weak_etag_does_not_stop_a_pinned_file_from_going_on(server, target):
    server.always[PATH] = headers({"ETag": 'W/"1"'})
    server.faults[PATH] = [reset(40_009)]
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]
    assert "If-Range" not in server.requests[1].headers


# --- the Hub --------------------------------------------------------------------------------------------------------


def test_weights_from_the_hub_are_resolved_at_each_try_and_resumed(hub, target):
    hub.cdn.faults[WEIGHTS] = [reset(20_011), truncate(30_011), status(403), status(500), reset(10_007)]
    fetch(remote(hub, WEIGHTS), target)
    assert starts(hub.cdn, WEIGHTS) == [None, 20_011, 50_022, 50_022, 50_022, 60_029]
    assert len(starts(hub, WEIGHTS)) == 6
    assert hub.cdn.sent(WEIGHTS) == len(CONTENT)
    etag = f'"{hub.cdn.etag(CONTENT)}"'
    assert [request.headers["If-Range"] for request in hub.cdn.requests] == [None] + [etag] * 5


def test_the_linked_digest_serves_and_the_etag_of_the_cdn_does_not(hub, target):
    assert download(remote(hub, WEIGHTS), target, Recorder()) == digest_of(CONTENT)
    target.unlink()
    hub.cdn.faults[WEIGHTS] = [garbage()]
    fails(remote(hub, WEIGHTS), target, "wrong bytes came")
    fetch(remote(hub, WEIGHTS), target)


def test_the_linked_digest_of_a_small_file(hub, target):
    content = hub.files[CONFIG]
    assert download(remote(hub, CONFIG), target, Recorder()) == digest_of(content, "git-sha1")
    target.unlink()
    fetch(pinned(hub, CONFIG, content), target, content)
    target.unlink()
    place = "/api/resolve-cache/models/openai-community/gpt2/607a30d7/config.json"
    hub.faults[place] = [garbage(), [reset(5), framed("chunked")]]
    fails(remote(hub, CONFIG), target, "wrong bytes came .*git-sha1")
    fetch(remote(hub, CONFIG), target, content)
    assert starts(hub, place) == [None, None, None, None, 5]


@pytest.mark.parametrize("etag", [None, '"abc"', '"' + "g" * 64 + '"', "0" * 39])
def test_another_kind_of_linked_etag_is_no_digest(hub, target, etag):
    hub.always[WEIGHTS] = headers({"X-Linked-ETag": etag})
    assert download(remote(hub, WEIGHTS), target, Recorder()) == digest_of(CONTENT)


def test_a_linked_etag_of_the_cdn_is_no_digest(hub, target):
    hub.always[WEIGHTS] = headers({"X-Linked-ETag": None})
    hub.cdn.always[WEIGHTS] = headers({"X-Linked-ETag": f'"{digest_of(OTHER)[7:]}"'})
    fetch(remote(hub, WEIGHTS), target)


def test_a_dead_cdn_is_an_error_without_the_signature(hub, target):
    hub.always[WEIGHTS] = redirect(f"{refused_url()}?X-Signature=5ecret")
    assert "5ecret" not in fails(pinned(hub, WEIGHTS), target, "the connection was refused")
    hub.always.clear()
    for fault in (status(404), status(403), status(500), reset(0), truncate(0), compressed(), garbage()):
        hub.cdn.always[WEIGHTS] = fault
        fails(pinned(hub, WEIGHTS), target, "weights")
    hub.cdn.always.clear()
    fetch(pinned(hub, WEIGHTS), target)


# --- the bucket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[BucketServer]:
    with BucketServer({BUCKET: CONTENT}) as bucket:
        yield bucket


def test_the_md5_of_the_bucket_serves(bucket, target):
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT, "md5")
    target.unlink()
    for faults in ([garbage()], [reset(40_009), garbage()]):
        bucket.faults[BUCKET] = faults
        fails(remote(bucket, BUCKET), target, "wrong bytes came .*md5")
        fetch(remote(bucket, BUCKET), target)
        target.unlink()


def test_the_md5_on_a_range_is_that_of_the_whole_file(bucket, target):
    of_range = base64.b64encode(hashlib.md5(CONTENT[40_009:]).digest()).decode()
    bucket.faults[BUCKET] = [[reset(40_009), headers({"Content-MD5": None})], headers({"Content-MD5": of_range})]
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT, "md5")
    assert target.read_bytes() == CONTENT
    assert bucket.sent(BUCKET) == len(CONTENT)


@pytest.mark.parametrize("value", ["", "=", "AAAA", "é"])
def test_another_kind_of_md5_is_no_digest(bucket, target, value):
    bucket.always[BUCKET] = headers({"Content-MD5": value})
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT)


# --- tokens and addresses -------------------------------------------------------------------------------------------


def test_the_token_goes_to_its_server_alone(hub, target, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-netrc")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hub.cdn.faults[WEIGHTS] = [reset(40_009), status(500)]
    fetch(replace(pinned(hub, WEIGHTS), token=TOKEN), target)
    assert {request.headers["Authorization"] for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert not hub.cdn.sees(TOKEN)
    assert len(hub.cdn.requests) == 3


def test_no_token_goes_over_plain_http_to_another_machine(hub, target, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **names: resolve("127.0.0.1", *rest, **names))
    for host, is_safe in (("models.test", False), ("127.0.0.1.test", False), ("localhost", True), ("127.0.0.2", True)):
        hub.forget() if hub.requests else None
        fetch(RemoteFile(f"http://{host}:{hub.port}{WEIGHTS}", "weights", token=TOKEN), target)
        assert hub.sees(TOKEN) == is_safe
        assert not hub.cdn.sees(TOKEN)


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN}\r\nX-Evil: 1", f"{TOKEN}é", f"{TOKEN} {TOKEN}", ""])
def test_a_token_that_is_none_is_not_shown(server, target, token):
    with pytest.raises(DownloadError, match="HF_TOKEN holds") as caught:
        download(replace(pinned(server), token=token), target, Recorder())
    assert TOKEN not in str(caught.value)
    assert server.requests == []


def test_no_error_shows_the_token(server, target):
    for fault in (status(401), status(403), status(404), redirect("ftp://x"), redirect(PATH), garbage(), compressed()):
        server.always[PATH] = fault
        fails(replace(pinned(server), token=TOKEN), target, "weights|redirects")


@pytest.mark.parametrize(
    "to", ["http://cdn.test/x", "HTTP://models.test/x", "ftp://models.test/", "file:///etc/passwd"]
)
def test_https_never_redirects_to_anything_else(monkeypatch, target, to):
    sent = []

    def send(self: object, request: requests.PreparedRequest, **settings: object) -> requests.Response:
        sent.append((request.url, request.headers.get("Authorization")))
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.raw = SimpleNamespace(close=lambda: None)
        response.headers["Location"] = "https://other.test/y?X-Signature=5ecret" if len(sent) == 1 else to
        return response

    monkeypatch.setattr(requests.Session, "send", send)
    wanted = RemoteFile("https://models.test/x", "weights", token=TOKEN)
    assert "5ecret" not in fails(wanted, target, "other.test redirects from https")
    assert sent == [("https://models.test/x", f"Bearer {TOKEN}"), ("https://other.test/y?X-Signature=5ecret", None)]


# --- the disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_has_come(monkeypatch, server, target):
    class Full(FileIO):
        def write(self, data: bytes) -> int:
            room = 40_009 - self.tell()
            if not room:
                raise OSError(28, "No space left on device")
            return super().write(data[:room])

    with monkeypatch.context() as patch:
        patch.setattr(part_file, "FileIO", Full)
        fails(pinned(server), target, f"cannot write weights in {target.parent}: No space left on device")
    server.forget()
    fetch(pinned(server), target)
    assert starts(server) == [40_009]


def test_the_space_is_checked_before_anything_is_written(monkeypatch, server, target):
    def disk(free: int) -> None:
        usage = SimpleNamespace(total=10**12, used=10**12 - free, free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)

    def spared(match: str) -> None:
        with pytest.raises(DownloadError, match=match):
            download(pinned(server), target, Recorder(), room_for_copy=True)

    disk(2 * 100_003 - 1)
    spared(r"needs 200\.0 kB of disk space, and .* has 200\.0 kB free")
    assert os.listdir(target.parent) == []
    disk(2 * 100_003)
    server.faults[PATH] = [reset(40_009), status(404)]
    spared("404")
    disk(59_994 + 100_003 - 1)  # of which a part is here
    spared("disk space")
    disk(59_994 + 100_003)
    server.forget()
    assert download(pinned(server), target, Recorder(), room_for_copy=True) == digest_of(CONTENT)
    assert starts(server) == [40_009]


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="Not a directory: it must be a folder"):
        download(pinned(server), tmp_path / "file" / "cache" / "weights", Recorder())
    assert server.requests == []


@posix
def test_a_folder_that_cannot_be_written_to(server, target):
    target.parent.mkdir(mode=0o500)
    nobody = 65534
    is_root = os.geteuid() == 0
    if is_root:  # root may write anywhere
        os.seteuid(nobody)
    try:
        with pytest.raises(DownloadError, match="Permission denied: it must be a folder that can be written to"):
            download(pinned(server), target, Recorder())
    finally:
        if is_root:
            os.seteuid(0)
    target.parent.chmod(0o700)
    assert os.listdir(target.parent) == []
    fetch(pinned(server), target)


@pytest.mark.parametrize("place", ["weights", "weights.part", "weights.part.json"])
def test_a_folder_where_a_file_should_be(server, tmp_path, place):
    (tmp_path / place / "x").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"weights.*[Ii]s a directory"):
        download(pinned(server), tmp_path / "weights", Recorder())
    assert (tmp_path / place / "x").is_dir()


# --- what another process has left ----------------------------------------------------------------------------------


def test_another_process_goes_on(server, target):
    for pins in ({}, {"digest": digest_of(CONTENT)}, {"n_bytes": len(CONTENT), "digest": digest_of(CONTENT, "md5")}):
        leave_part(server, target, **pins)
        progress = fetch(remote(server, **pins), target)
        assert starts(server) == [40_009]
        assert server.requests[0].headers["If-Range"] == f'"{server.etag(CONTENT)}"'
        assert progress.starts == [("weights", len(CONTENT), 40_009)]
        assert progress.came == len(CONTENT) - 40_009
        target.unlink()


@pytest.mark.parametrize(
    "state",
    [
        None,
        "",
        "[]",
        "null",
        '{"version": 0, "etag": null, "digest": "DIGEST"}',
        '{"version": 2, "etag": null, "digest": "DIGEST"}',
        '{"version": 1, "etag": null, "digest": "DIGEST", "more": 1}',
        '{"etag": null, "digest": "DIGEST", "version": "1"}',
        "\udcff",
    ],
)
def test_a_part_of_another_version_is_thrown_away(server, target, state):
    leave_part(server, target)
    part_of(target).write_bytes(OTHER[:40_009])
    if state is None:
        state_of(target).unlink()
    else:
        state_of(target).write_text(state.replace("DIGEST", digest_of(CONTENT)), errors="surrogateescape")
    fetch(pinned(server), target)
    assert starts(server) == [None]


@pytest.mark.parametrize(
    ("etag", "digest"), [(5, None), (["a"], None), ('"a\r\nX-Evil: 1"', None), (None, 5), (None, "sha3:x"), (None, "x")]
)
def test_a_state_with_odd_values_is_no_traceback(server, target, etag, digest):
    leave_part(server, target)
    state_of(target).write_text(json.dumps({"version": 1, "etag": etag, "digest": digest}))
    fetch(remote(server), target)


def test_a_part_of_another_pinned_file_is_thrown_away(server, target):
    leave_part(server, target, digest=digest_of(OTHER))
    fetch(pinned(server), target)
    assert starts(server) == [None]


def test_a_state_without_its_part_says_nothing(hub, target):
    hub.cdn.faults[WEIGHTS] = [reset(40_009), status(404)]
    fails(remote(hub, WEIGHTS), target, "404")
    part_of(target).unlink()
    hub.files[WEIGHTS] = OTHER
    hub.always[WEIGHTS] = headers({"X-Linked-ETag": None})
    fetch(remote(hub, WEIGHTS), target, OTHER)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_part_longer_than_the_file_is_thrown_away(server, target, is_pinned):
    pins = {"n_bytes": len(CONTENT), "digest": digest_of(CONTENT)} if is_pinned else {}
    leave_part(server, target, **pins)
    part_of(target).write_bytes(CONTENT + b"x")
    fetch(remote(server, **pins), target)
    assert starts(server) == ([None] if is_pinned else [100_004, None])


def test_a_complete_part_is_only_hashed(server, target):
    leave_part(server, target)
    part_of(target).write_bytes(CONTENT)
    fetch(remote(server), target)
    assert [(request.start, request.status) for request in server.requests] == [(len(CONTENT), 416)]
    target.unlink()
    leave_part(server, target, digest=digest_of(CONTENT))
    part_of(target).write_bytes(CONTENT)
    server.always[PATH] = status(500)
    assert download(pinned(server), target, Recorder()) == digest_of(CONTENT)
    assert server.requests == []


def test_a_complete_part_with_wrong_bytes_is_thrown_away(server, target):
    leave_part(server, target, digest=digest_of(CONTENT))
    part_of(target).write_bytes(OTHER)
    fails(pinned(server), target, "wrong bytes came")
    fetch(pinned(server), target)


# --- processes that end ---------------------------------------------------------------------------------------------


def start_child(server: FileServer, target: Path, limit: int = 0) -> "subprocess.Popen[bytes]":
    wanted = pinned(server)
    args = (wanted.url, target, wanted.n_bytes, wanted.digest, limit)
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, args)], stderr=subprocess.PIPE)


def wait_for_part(target: Path, n_bytes: int) -> None:
    end = time.monotonic() + PATIENCE
    while not part_of(target).exists() or part_of(target).stat().st_size < n_bytes:
        assert time.monotonic() < end
        time.sleep(0.001)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_process_that_is_ended_leaves_what_has_come(server, target, number, code):
    server.faults[PATH] = [stall(40_009)]
    with start_child(server, target) as child:
        wait_for_part(target, 40_009)
        child.send_signal(number)
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == code
    assert b"Traceback" not in err
    assert not target.exists()
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]
    assert server.sent(PATH) == len(CONTENT)


@posix
def test_a_process_that_is_killed_while_bytes_come(server, target):
    server.rate = 200_000
    with start_child(server, target) as child:
        wait_for_part(target, 10_007)
        child.kill()
        child.communicate(timeout=PATIENCE)
    size = part_of(target).stat().st_size
    assert 10_007 <= size < len(CONTENT)
    server.rate = None
    fetch(pinned(server), target)
    first, second = server.requests
    assert second.start == size
    assert first.sent - size <= 20_011  # what was on its way, and no more


@posix
def test_a_limit_of_the_system(server, target):
    with start_child(server, target, limit=40_009) as child:
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1
    assert b"Traceback" not in err
    assert b"DownloadError: cannot write weights" in err
    assert b"File too large" in err
    assert not target.exists()
    server.forget()
    fetch(pinned(server), target)
    assert starts(server) == [40_009]
