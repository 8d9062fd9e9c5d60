"""`gpt-xp look --serve`: it answers its own page, and nothing else."""

import http.client
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from commands import PATIENCE, posix, process, start

from gpt_xp import Model
from gpt_xp.comparison.distances import Distance
from gpt_xp.errors import SettingError
from gpt_xp.inspection import server as server_module
from gpt_xp.inspection.page import pack, page
from gpt_xp.inspection.server import LookServer

PROMPT = "To be, or not"


@pytest.fixture
def served(shakespeare: Model) -> Iterator[LookServer]:
    def looking(text: Any, position: int | None, again: bool) -> Any:
        found = shakespeare.look(text, position=position)
        return replace(found, distances=(Distance("other", "float32"),)) if again else found

    server = LookServer()
    look = looking(PROMPT, None, True)
    thread = threading.Thread(target=server.serve, args=(shakespeare, look, looking), daemon=True)
    thread.start()
    assert ask(server)[0] == 200  # It has begun.
    yield server
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


def ask(
    server: LookServer, name: str = "", request: Any = None, method: str | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    """Return the status, the content and the headers of the answer. `name` is what follows the secret path."""
    body = request if request is None or isinstance(request, bytes) else json.dumps(request).encode()
    path = name if name.startswith("/") else f"/{server.secret}/{name}"
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def test_the_page_is_served(served: LookServer) -> None:
    status, content, headers = ask(served)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert content.decode() == page(served.look, server=True)
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_address_without_its_last_slash_leads_there(served: LookServer) -> None:
    status, _, headers = ask(served, f"/{served.secret}")
    assert (status, headers["Location"]) == (301, urlsplit(served.url).path)


def test_it_listens_on_this_machine_alone(served: LookServer) -> None:
    assert served.server_address[0] == "127.0.0.1"
    assert len(served.secret) >= 20


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/look", "/../etc/passwd", "other", "look", "look/", "?x"])
def test_all_else_is_not_found(served: LookServer, path: str) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(served, path, method=method)[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_not_found(served: LookServer, method: str) -> None:
    assert ask(served, "", method=method)[0] == 404


@pytest.mark.parametrize("path", ["/", "/look", "other", "", "look/x"])
def test_no_other_address_takes_requests(served: LookServer, path: str) -> None:
    status, content, headers = ask(served, path, {"prompt": "x"})
    assert (status, headers["Connection"]) == (404, "close")
    assert b"x" not in content


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.com"},
        {"Host": "example.com:PORT"},
        {"Host": "127.0.0.1:1"},
        {"Host": ""},
        {"Origin": "http://example.com"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:PORT"},
    ],
)
@pytest.mark.parametrize("name", ["", "look"])
def test_a_page_of_another_site_gets_nothing(served: LookServer, name: str, headers: dict[str, str]) -> None:
    """Neither by a name that points to this machine (DNS rebinding), nor by a request across sites."""
    headers = {key: value.replace("PORT", str(served.port)) for key, value in headers.items()}
    assert ask(served, name, {"prompt": "x"} if name else None, **headers)[0] == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_its_own_page_is_answered(served: LookServer, host: str) -> None:
    own = f"{host}:{served.port}"
    status, _, headers = ask(served, "look", {"prompt": "x"}, Host=own, Origin=f"http://{own}")
    assert (status, headers["Content-Type"]) == (200, "application/octet-stream")


def test_another_prompt(served: LookServer, shakespeare: Model) -> None:
    status, content, _ = ask(served, "look", {"prompt": "ROMEO:"})
    assert status == 200
    assert content == pack(replace(shakespeare.look("ROMEO:"), distances=(Distance("other", "float32"),)))
    assert ask(served)[1].decode() == page(served.look, server=True)
    assert served.look.prompt == "ROMEO:"


def test_another_position_of_the_same_prompt_keeps_the_distances(served: LookServer) -> None:
    before = served.look
    status, content, _ = ask(served, "look", {"token_ids": list(before.token_ids), "position": 1})
    assert status == 200
    assert content == pack(served.look)
    assert served.look.distances is before.distances
    assert (served.look.prompt, served.look.predictions.position) == (PROMPT, 1)


def test_another_position_of_another_prompt_keeps_its_text(served: LookServer) -> None:
    """Two tabs may show two prompts."""
    status, _, _ = ask(served, "look", {"token_ids": [3, 1, 4], "position": 1, "text": "mine"})
    assert status == 200
    assert (served.look.prompt, served.look.token_ids) == ("mine", (3, 1, 4))


def test_a_fault_of_an_answer_is_told_on_stderr(served: LookServer, capsys: pytest.CaptureFixture[str]) -> None:
    for error, is_told in ((BrokenPipeError(), False), (ValueError("a fault"), True)):
        try:
            raise error
        except Exception:
            served.handle_error(None, ("127.0.0.1", 1))
        assert ("a fault" in capsys.readouterr().err) == is_told


def test_the_weights_of_one_head(served: LookServer, shakespeare: Model) -> None:
    ids = [3, 1, 4, 1, 5]
    status, content, _ = ask(served, "attention", {"token_ids": ids, "layer": 4, "head": 2})
    assert status == 200
    pattern = shakespeare.trace(ids, "blocks.4.attn.hook_pattern")["blocks.4.attn.hook_pattern"][2]
    np.testing.assert_array_equal(np.frombuffer(content, "<f4"), pattern[np.tril_indices(5)])


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("look", b"{", "Expecting"),
        ("look", b"\xff", "utf-8"),
        ("look", [], "must be a JSON object"),
        ("look", {}, "the field prompt of a request must be text"),
        ("look", {"prompt": 3}, "the field prompt of a request must be text"),
        ("look", {"prompt": "x", "position": "1"}, "position of a request must be a whole number"),
        ("look", {"prompt": "x", "position": 7}, "position must be the number of one of the 1 tokens"),
        ("look", {"token_ids": "text"}, "token_ids of a request must be a list"),
        ("look", {"token_ids": [1, 9999]}, "token id 9999 is not in the model's vocabulary"),
        ("look", {"token_ids": [[1], 2]}, "a prompt is text"),
        ("look", {"prompt": "a b " * 300}, "the context of this model holds 256"),
        ("attention", {"token_ids": [1], "layer": 6, "head": 0}, "there is no head 0 in layer 6"),
        ("attention", {"token_ids": [1], "layer": -1, "head": 0}, "there is no head 0 in layer -1"),
        ("attention", {"token_ids": [1], "layer": True, "head": 0}, "layer of a request must be a whole number"),
        ("attention", {"layer": 0, "head": 0}, "token_ids of a request must be a list"),
    ],
)
def test_a_bad_request_has_one_error_and_changes_nothing(
    served: LookServer, name: str, request_: Any, message: str
) -> None:
    before = served.look
    status, content, headers = ask(served, name, request_)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    assert message in json.loads(content)["error"]
    assert served.look is before


def test_a_request_that_is_too_long_is_not_read(served: LookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LARGEST_REQUEST", 10)
    status, content, headers = ask(served, "look", {"prompt": "a longer prompt"})
    assert (status, headers["Connection"]) == (400, "close")
    assert b"at most 10 bytes" in content


def test_a_fault_is_told_and_the_server_goes_on(served: LookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "looking", lambda *args: 1 / 0)
    status, content, _ = ask(served, "look", {"prompt": "x"})
    assert (status, json.loads(content)["error"]) == (500, "ZeroDivisionError: division by zero")
    assert ask(served)[0] == 200


def test_requests_at_once_are_computed_one_after_the_other(served: LookServer) -> None:
    inside, most = [], []
    looking = served.looking

    def watched(*args: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        found = looking(*args)
        inside.pop()
        return found

    served.looking = watched
    threads = [threading.Thread(target=ask, args=(served, "look", {"prompt": f"{i}"})) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert most == [1] * 5


def test_what_is_no_http_does_no_harm(served: LookServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as connection:
        connection.sendall(b"\x16\x03\x01\r\n\r\n")
        assert connection.recv(100) == b"not found\n"
    assert ask(served)[0] == 200


def test_a_port_that_is_taken(served: LookServer) -> None:
    with pytest.raises(SettingError, match=f"the port {served.port} of 127.0.0.1 cannot be used .*: choose another"):
        LookServer(served.port)


@posix
def test_the_command_serves_until_ctrl_c() -> None:
    running = start("look", "-m", "shakespeare", "--serve", "To be")
    assert running.stdout is not None
    url = urlsplit(running.stdout.readline().decode().strip())
    assert (url.scheme, url.hostname) == ("http", "127.0.0.1")
    with closing(http.client.HTTPConnection("127.0.0.1", url.port, timeout=PATIENCE)) as connection:
        connection.request("GET", url.path)  # and the connection stays open
        assert connection.getresponse().status == 200
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", url.port or 0), timeout=PATIENCE)


def test_a_taken_port_is_an_error_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = process("look", "-m", "no/such/model", "--serve", "--port", str(taken.getsockname()[1]), "To be")
    assert found.code == 1
    assert "cannot be used (Address already in use): choose another one" in found.err
    assert "Traceback" not in found.err
