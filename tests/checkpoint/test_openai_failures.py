"""A conversion that fails leaves the directory as it was, and says why in one error."""

import errno
import os
import threading
from pathlib import Path

import pytest
from checkpoint_files import WEIGHTS, assert_same, contents, listing
from commands import PATIENCE
from openai_files import OPENAI_FILES, FakeReader, converted, make_tensors

from gpt_xp.checkpoint import openai as openai_checkpoint
from gpt_xp.checkpoint.openai import convert
from gpt_xp.errors import CheckpointError, DeviceMemoryError

# --- converting, when it fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_conversion_that_is_stopped_is_finished_by_the_next(folder, tensorflow, monkeypatch, stopped_at):
    replace, calls = os.replace, []

    def stop(source, destination):
        calls.append(os.path.basename(destination))
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(folder)
    assert calls == [WEIGHTS, "config.json"][:stopped_at]
    assert listing(folder) == sorted([*OPENAI_FILES, WEIGHTS][: len(OPENAI_FILES) + stopped_at - 1])
    assert_same(converted(folder), make_tensors())
    assert len(tensorflow.opened) == 3 - stopped_at


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (errno.EACCES, r"cannot write .*model\.safetensors \(Permission denied\); copy .* where you may write"),
        (errno.EROFS, r"cannot write .*model\.safetensors \(Read-only file system\); copy .* where you may write"),
        (errno.ENOSPC, r"cannot write .*model\.safetensors \(No space left on device\); it needs .* there: make room"),
    ],
)
@pytest.mark.parametrize("former", [False, True])
def test_a_directory_that_cannot_be_written_to(folder, tensorflow, monkeypatch, number, complaint, former):
    if former:
        convert(folder)
        (folder / "model.ckpt.index").write_bytes(b"index 2")
    before = contents(folder)

    def refuse(path, *args):
        Path(path).write_bytes(b"begun")
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(openai_checkpoint, "write_safetensors", refuse)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError, OSError])
def test_what_tensorflow_finds_wrong_is_one_error(folder, tensorflow, monkeypatch, error):
    def fail(self, name):
        if name.endswith("c_fc/b"):
            raise error("Checksum does not match\n  in a long\n  trace")
        return self.found[name]

    monkeypatch.setattr(FakeReader, "get_tensor", fail)
    with pytest.raises(
        CheckpointError, match=r"model\.ckpt is truncated, damaged .*\(Checksum does not match\).*again"
    ):
        convert(folder)
    assert listing(folder) == OPENAI_FILES


def test_memory_that_runs_out_is_no_damage(folder, tensorflow, monkeypatch):
    def fail(self, name):
        raise MemoryError

    monkeypatch.setattr(FakeReader, "get_tensor", fail)
    with pytest.raises(DeviceMemoryError, match="not enough memory"):
        convert(folder)


def test_files_reach_the_disk_before_they_take_their_names(folder, tensorflow, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(os.path.basename(new)), replace(old, new)))
    convert(folder)
    assert events == ["sync", WEIGHTS, "sync", "config.json"]


def test_two_at_once_do_each_other_no_harm(folder, tensorflow, monkeypatch):
    both = threading.Barrier(2, timeout=PATIENCE)
    errors = []

    def read(self, name):
        if name.endswith("wpe"):
            both.wait()  # now both are in the middle
        return self.found[name]

    def run():
        try:
            convert(folder)
        except BaseException as error:  # a thread would swallow it
            errors.append(error)

    monkeypatch.setattr(FakeReader, "get_tensor", read)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(tensorflow.opened) == 2
    assert listing(folder) == sorted([*OPENAI_FILES, WEIGHTS, "config.json"])
    assert_same(converted(folder), make_tensors())
