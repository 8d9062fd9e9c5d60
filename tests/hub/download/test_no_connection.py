"""No connection: one clear line, and no password in it."""

import socket
import ssl
import sys
from dataclasses import replace

import pytest
import requests
from downloads import CONTENT, PATH, TOKEN, fails, fetch, pinned, refused_url
from servers import FileServer, late, stall

import gpt_xp.hub.download as module
from gpt_xp.hub.download import RemoteFile


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
