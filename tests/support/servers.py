"""Local servers that behave like the Hugging Face Hub and OpenAI's bucket, and misbehave when told to.

    with FileServer({"/a": b"..."}) as server:
        server.faults["/a"] = [reset(1009), status(503)]       # one for each request, in turn; then all is well
        server.always["/a"] = no_ranges()                      # at every request
        ...
        assert server.requests[1].start == 1009

A fault takes the answer that was due and returns another one; a list of faults is applied one after the other.
"""

import base64
import gzip
import hashlib
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

LAST_MODIFIED = "Tue, 05 Nov 2019 13:17:19 GMT"
BLOCK = 1 << 16


@dataclass
class Request:
    """One request, and the bytes that were sent for it."""

    path: str
    query: str
    headers: Message
    status: int = 0
    start: int | None = None  # where its Range begins
    sent: int = 0  # bytes of the body that went out


@dataclass
class Answer:
    """The answer to a request, and the way in which it is sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    late: float = 0  # seconds before the headers
    stop: int | None = None  # after so many bytes of the body comes `ending`
    ending: str = ""  # "reset", "close", or "stall" for so many `seconds`
    seconds: float = 0
    framing: str = "length"  # how the client sees where the body ends: "length", "chunked", "close"


class FileServer:
    """Serves `files`, from paths to bytes, with ETag and ranges; `rate` limits the bytes per second."""

    def __init__(self, files: dict[str, bytes] | None = None, *, rate: float | None = None) -> None:
        self.files = {} if files is None else files
        self.rate = rate
        self.faults: dict[str, list[Any]] = {}
        self.always: dict[str, Any] = {}
        self.errors: list[BaseException] = []
        self._requests: list[Request] = []
        self._running = 0
        self._changed = threading.Condition()
        self._listener = Listener(self)
        self.port = self._listener.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.hang_up()
        if self.errors and error is None:
            raise self.errors[0]

    @property
    def requests(self) -> list[Request]:
        """The requests so far; it waits until all of them are answered."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, 10), "a request is still being answered"
            return list(self._requests)

    def forget(self) -> None:
        """Count requests from here."""
        assert self.requests
        self._requests.clear()

    def sent(self, path: str) -> int:
        """Return how many bytes of the file were sent, at all requests together."""
        return sum(request.sent for request in self.requests if request.path == path and request.status in (200, 206))

    def sees(self, text: str) -> bool:
        """Return whether any request had `text` in its address or headers."""
        return any(text in f"{request.path}?{request.query}\n{request.headers}" for request in self.requests)

    # What a kind of server answers

    def etag(self, content: bytes) -> str:
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def extra_headers(self, content: bytes, status: int) -> dict[str, str]:
        return {}

    def refuse(self, request: Request) -> Answer | None:
        """Return the answer to a request that is not allowed."""

    def answer(self, request: Request) -> Answer:
        """Return the answer of a server in good health."""
        if request.path not in self.files:
            return Answer(404, {"Content-Type": "text/plain"}, b"Entry not found")
        return self.file_answer(request, self.files[request.path])

    def file_answer(self, request: Request, content: bytes) -> Answer:
        etag = f'"{self.etag(content)}"'
        headers = {"ETag": etag, "Last-Modified": LAST_MODIFIED, "Accept-Ranges": "bytes"}
        condition = request.headers.get("If-Range")  # a weak ETag never fits
        if request.start is None or condition not in (None, etag, LAST_MODIFIED):
            return Answer(200, headers | self.extra_headers(content, 200), content)
        if request.start >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"out of range")
        headers["Content-Range"] = f"bytes {request.start}-{len(content) - 1}/{len(content)}"
        return Answer(206, headers | self.extra_headers(content, 206), content[request.start :])

    # What happens to it

    def begin(self, handler: "Handler") -> tuple[Request, Answer]:
        path, _, query = handler.path.partition("?")
        request = Request(path, query, handler.headers)
        with self._changed:
            self._requests.append(request)
            self._running += 1
            queue = self.faults.get(path)
            fault = queue.pop(0) if queue else None
        if wanted := request.headers.get("Range"):
            request.start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        answer = self.refuse(request) or self.answer(request)
        for change in (self.always.get(path), *(fault if isinstance(fault, list) else [fault])):
            answer = change(self, request, answer) if change else answer
        request.status = answer.status
        return request, answer

    def end(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


class Listener(ThreadingHTTPServer):
    """Knows its connections, so that it can end while clients keep them open."""

    daemon_threads = False  # server_close() waits for them

    def __init__(self, owner: FileServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.owner = owner
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):  # a client that went away is none
            self.owner.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    """Sends what the owner of its listener answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def do_GET(self) -> None:
        try:
            request, answer = self.server.owner.begin(self)
            if self.pause(answer.late):
                self.send_head(answer)
                self.send_body(request, answer)
        finally:
            self.server.owner.end()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send_head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        framing = {
            "length": ("Content-Length", str(len(answer.body))),
            "chunked": ("Transfer-Encoding", "chunked"),
            "close": ("Connection", "close"),  # http.server closes the connection when it sends this
        }
        for name, value in {**dict([framing[answer.framing]]), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, request: Request, answer: Answer) -> None:
        stop = len(answer.body) if answer.stop is None else answer.stop
        self.send_bytes(request, answer.body[:stop], answer.framing)
        if answer.ending == "reset":
            self.reset()
        elif answer.ending == "close":
            self.close_connection = True
        elif answer.ending != "stall" or self.pause(answer.seconds):
            self.send_bytes(request, answer.body[stop:], answer.framing)
            if answer.framing == "chunked":
                self.wfile.write(b"0\r\n\r\n")

    def send_bytes(self, request: Request, data: bytes, framing: str) -> None:
        rate = self.server.owner.rate
        block = BLOCK if rate is None else max(1, int(rate / 50))
        for at in range(0, len(data), block):
            piece = data[at : at + block]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece)
            request.sent += len(piece)
            if rate is not None and not self.pause(len(piece) / rate):
                return

    def pause(self, seconds: float) -> bool:
        """Wait, but not for a client that goes away: then return False."""
        if select.select([self.connection], [], [], seconds)[0]:
            self.close_connection = True
        return not self.close_connection

    def reset(self) -> None:
        """End the connection by RST; all that was sent has reached the client by then, and it has had time to read."""
        for _ in range(1000):
            if not unacknowledged(self.connection):
                break
            time.sleep(0.001)
        time.sleep(0.01)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the connection open
        self.connection.close()
        self.close_connection = True


def unacknowledged(connection: socket.socket) -> int:
    """Return the number of bytes that the other side's kernel has not got yet, as far as this system tells."""
    try:
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4), "little")
    except (ImportError, OSError):
        return 0


# --- faults ---------------------------------------------------------------------------------------------------------

Fault = Callable[[FileServer, Request, Answer], Answer]


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"<html>no\n\x1b[31m</html>") -> Fault:
    return lambda server, request, answer: Answer(code, headers or {}, body)


def redirect(url: str, code: int = 302) -> Fault:
    return status(code, {"Location": url})


def headers(changes: dict[str, str | None]) -> Fault:
    """Answer with changed headers; None removes a header."""

    def fault(server: FileServer, request: Request, answer: Answer) -> Answer:
        changed = {name: value for name, value in (answer.headers | changes).items() if value is not None}
        return replace(answer, headers=changed)

    return fault


def reset(after: int) -> Fault:
    return lambda server, request, answer: replace(answer, stop=after, ending="reset")


def truncate(after: int) -> Fault:
    """Close the connection normally, but too early."""
    return lambda server, request, answer: replace(answer, stop=after, ending="close")


def stall(after: int, seconds: float = 60) -> Fault:
    """Pause for some seconds within the body, and then send the rest."""
    return lambda server, request, answer: replace(answer, stop=after, ending="stall", seconds=seconds)


def late(seconds: float = 60) -> Fault:
    return lambda server, request, answer: replace(answer, late=seconds)


def no_ranges() -> Fault:
    """Answer every request with the whole file."""

    def fault(server: FileServer, request: Request, answer: Answer) -> Answer:
        whole = server.answer(replace(request, start=None))
        return replace(whole, headers={**whole.headers, "Accept-Ranges": "none"})

    return fault


def garbage() -> Fault:
    """Answer with the right number of bytes, all of them wrong."""
    return lambda server, request, answer: replace(answer, body=bytes(byte ^ 0x55 for byte in answer.body))


def change(content: bytes) -> Fault:
    """Replace the file by another one from now on."""

    def fault(server: FileServer, request: Request, answer: Answer) -> Answer:
        server.files[request.path] = content
        return server.answer(request)

    return fault


def compressed() -> Fault:
    """Answer with gzip, which was not requested."""

    def fault(server: FileServer, request: Request, answer: Answer) -> Answer:
        changed = {**answer.headers, "Content-Encoding": "gzip"}
        return replace(answer, headers=changed, body=gzip.compress(answer.body))

    return fault


def framed(framing: str) -> Fault:
    """No Content-Length: "chunked" or "close"."""
    return lambda server, request, answer: replace(answer, framing=framing)


# --- the Hub and the bucket -----------------------------------------------------------------------------------------


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class CDN(FileServer):
    """Where the Hub keeps large files: an address is signed, and good for one request."""

    def __init__(self) -> None:
        super().__init__()
        self.signatures: set[str] = set()

    def sign(self, path: str) -> str:
        signature = secrets.token_hex(16)
        self.signatures.add(signature)
        return f"{self.url}{path}?X-Expires=3600&X-Signature={signature}"

    def etag(self, content: bytes) -> str:
        return hashlib.sha256(b"cdn" + content).hexdigest()  # looks like the file's sha256 and is not

    def refuse(self, request: Request) -> Answer | None:
        signature = request.query.rpartition("=")[2]
        if signature not in self.signatures:
            return Answer(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
        self.signatures.discard(signature)
        return None


class HubServer(FileServer):
    """`files` are at "/owner/name/resolve/revision/file"; weights are on the CDN, under the same path."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(files)
        self.cdn = CDN()

    def __enter__(self) -> Self:
        self.cdn.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.cdn.__exit__(*error)

    def etag(self, content: bytes) -> str:
        return git_sha1(content)

    def answer(self, request: Request) -> Answer:
        if request.path.startswith("/api/resolve-cache/models/"):
            owner, name, revision, file = request.path.removeprefix("/api/resolve-cache/models/").split("/", 3)
            content = self.files[f"/{owner}/{name}/resolve/{revision}/{file}"]
            return self.file_answer(request, content)
        if request.path not in self.files:
            return Answer(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found")
        return self.resolve(request.path, self.files[request.path])

    def resolve(self, path: str, content: bytes) -> Answer:
        repo, _, place = path.strip("/").partition("/resolve/")
        headers = {"X-Repo-Commit": place.partition("/")[0], "X-Linked-Size": str(len(content))}
        if path.endswith(".safetensors"):
            self.cdn.files[path] = content
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Location": self.cdn.sign(path)}
            return Answer(302, headers, b"Found. Redirecting to the CDN")
        etag = git_sha1(content)
        location = f"/api/resolve-cache/models/{repo}/{place}?etag=%22{etag}%22"
        headers |= {"X-Linked-ETag": f'"{etag}"', "Location": location}
        return Answer(307, headers, b"Temporary Redirect")


class BucketServer(FileServer):
    """Azure's way: `files` are at "/gpt-2/models/size/file", and the MD5 is in a header."""

    def etag(self, content: bytes) -> str:
        return "0x8D" + hashlib.sha256(content).hexdigest()[:11].upper()

    def extra_headers(self, content: bytes, status: int) -> dict[str, str]:
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {"Content-MD5" if status == 200 else "x-ms-blob-content-md5": digest}
