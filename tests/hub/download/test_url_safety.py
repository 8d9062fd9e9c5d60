"""Tokens go to their server alone, over https, and no error shows one."""

import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import requests
from downloads import PATH, TOKEN, WEIGHTS, Recorder, fails, fetch, pinned
from servers import compressed, garbage, redirect, reset, status

from gpt_xp.errors import DownloadError
from gpt_xp.hub.download import RemoteFile, download

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
