"""Wrong bytes never get the name of the file, and a file that changes begins anew."""

import os
from dataclasses import replace
from io import FileIO

import pytest
from downloads import CONTENT, OTHER, PATH, WEIGHTS, digest_of, fails, fetch, part_of, pinned, remote, starts
from servers import change, framed, garbage, headers, reset

from gpt_xp.hub import part_file

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
