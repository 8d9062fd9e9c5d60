"""A file comes whole, and a break is resumed: the right bytes under the name, and no byte twice."""

import contextlib
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from downloads import CONTENT, PATH, Recorder, digest_of, fails, fetch, pinned, remote, starts
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FileServer, framed, reset, stall, status, truncate

import gpt_xp.hub.download as module
from gpt_xp.errors import DownloadError
from gpt_xp.hub.download import download

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
