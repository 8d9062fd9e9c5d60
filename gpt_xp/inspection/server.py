"""Serve the page of a look on this machine alone, and compute what it asks for.

The server listens on 127.0.0.1. It answers only under a path that nobody can guess, and only if the `Host` header names
this machine: otherwise a page of another site could reach it through a name that it points here (DNS rebinding).
"""

import dataclasses
import json
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from gpt_xp import json_text
from gpt_xp.errors import GptXpError, JsonError, SettingError
from gpt_xp.inspection.page import pack, page
from gpt_xp.inspection.results import Look
from gpt_xp.model import Model
from gpt_xp.processes import one_line
from gpt_xp.types import NumpyArray

HOST = "127.0.0.1"
LARGEST_REQUEST = 1_000_000  # bytes

Looking = Callable[[Any, int | None, bool], Look]  # (text or token ids, position, with distances) -> Look


class LookServer(ThreadingHTTPServer):
    """Serves a look, and other looks at the same model. `url` is the address of the page.

    `port` 0 takes any free port. Raises `SettingError` for a port that is not free.
    """

    daemon_threads = True  # An open connection does not keep the process alive.
    model: Model
    look: Look
    looking: Looking

    def __init__(self, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise SettingError(f"the port {port} of {HOST} cannot be used ({why}): choose another one") from None
        self.lock = threading.Lock()  # The model computes for one request at a time.
        self.secret = secrets.token_urlsafe(16)
        self.port = int(self.server_address[1])
        self.url = f"http://{HOST}:{self.port}/{self.secret}/"

    def serve(self, model: Model, look: Look, looking: Looking) -> None:
        """Answer requests for `look`, and for other looks that `looking` computes, until `shutdown` is called."""
        self.model, self.look, self.looking = model, look, looking
        self.serve_forever()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing where the browser went away before it had its answer."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def answer_look(self, request: dict[str, Any]) -> bytes:
        """Return the packed look at a `prompt` (text) or at `token_ids`, with all logits at `position`.

        `text` is the prompt that the token ids are of, for the page to show.
        """
        ids = _field(request, "token_ids", list) if "token_ids" in request else None
        prompt = _field(request, "prompt", str) if ids is None else ids
        position = _field(request, "position", int) if "position" in request else None
        with self.lock:
            # For another position of the same prompt, the backends need not run again.
            is_same = ids is not None and tuple(ids) == self.look.token_ids
            found = self.looking(prompt, position, not is_same)
            if is_same:
                found = dataclasses.replace(found, prompt=self.look.prompt, distances=self.look.distances)
            elif "text" in request:
                found = dataclasses.replace(found, prompt=_field(request, "text", str))
            self.look = found
            return pack(found)

    def answer_attention(self, request: dict[str, Any]) -> bytes:
        """Return the weights of one head: the lower triangle, row by row, float32, the lowest byte first."""
        ids, layer, head = (
            _field(request, "token_ids", list),
            _field(request, "layer", int),
            _field(request, "head", int),
        )
        config = self.model.config
        if not (0 <= layer < config.n_layer and 0 <= head < config.n_head):
            raise SettingError(f"there is no head {head} in layer {layer} of this model")
        name = f"blocks.{layer}.attn.hook_pattern"
        with self.lock:
            pattern = self.model.trace(ids, name)[name][head]
        weights: NumpyArray = pattern[np.tril_indices(len(pattern))]
        return weights.astype("<f4").tobytes()


def _field(request: dict[str, Any], name: str, kind: type) -> Any:
    value = request.get(name)
    if type(value) is not kind:
        known = {str: "text", int: "a whole number", list: "a list"}[kind]
        raise SettingError(f"the field {name} of a request must be {known}")
    return value


class _Handler(BaseHTTPRequestHandler):
    server: LookServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds to wait for a request, or for the rest of it

    def do_GET(self) -> None:
        if self._is_for("") or self._is_for("index.html"):
            with self.server.lock:
                content = page(self.server.look, server=True).encode()
            self._answer(200, "text/html; charset=utf-8", content)
        elif self._is_for(None):
            self._answer(301, "text/plain", b"", Location=f"/{self.server.secret}/")
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        answers = {"look": self.server.answer_look, "attention": self.server.answer_attention}
        answer = next((found for name, found in answers.items() if self._is_for(name)), None)
        if answer is None:
            self.send_error(404)
            return
        try:
            content = answer(self._request())
        except GptXpError as error:
            self._answer(400, "application/json", json.dumps({"error": str(error)}).encode())
        except Exception as error:  # The browser shows it; the server goes on.
            self._answer(500, "application/json", json.dumps({"error": one_line(error)}).encode())
        else:
            self._answer(200, "application/octet-stream", content)

    def _is_for(self, name: str | None) -> bool:
        """Return whether the request is for this name under the secret path, and comes from a page of this server.

        None is the path without its last slash, which is easily lost in copying.
        """
        path = f"/{self.server.secret}" + ("" if name is None else f"/{name}")
        names = (HOST, "localhost")
        hosts = {f"{name}:{self.server.port}" for name in names}
        if self.server.port == 80:  # Browsers leave this number out.
            hosts.update(names)
        origin = self.headers.get("Origin")
        is_own = origin is None or origin.removeprefix("http://") in hosts
        return self.headers.get("Host") in hosts and is_own and self.path == path

    def _request(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self.close_connection = True
            raise SettingError(f"a request must have a length of at most {LARGEST_REQUEST} bytes")
        found = json_text.parse(self.rfile.read(int(length)))
        if not isinstance(found, dict):
            raise JsonError("a request must be a JSON object")
        return found

    def _answer(self, code: int, kind: str, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            **({"Connection": "close"} if self.close_connection else {}),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer 404 to every request that is not the page's."""
        self.close_connection = True
        self._answer(404, "text/plain", b"not found\n")

    def version_string(self) -> str:
        return "gpt-xp"

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the address holds the secret."""
