"""The disk and the part of a file that another process has left."""

import json
import os
from io import FileIO
from types import SimpleNamespace

import pytest
from downloads import (
    CONTENT,
    OTHER,
    PATH,
    WEIGHTS,
    Recorder,
    digest_of,
    fails,
    fetch,
    leave_part,
    part_of,
    pinned,
    posix,
    remote,
    starts,
    state_of,
)
from servers import headers, reset, status

import gpt_xp.hub.download as module
from gpt_xp.errors import DownloadError
from gpt_xp.hub import part_file
from gpt_xp.hub.download import download

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
