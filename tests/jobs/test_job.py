"""`job.json`: written once, and a later call must give the same."""

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpt_xp
from gpt_xp.errors import CheckpointError, SettingError
from gpt_xp.jobs import job as module
from gpt_xp.jobs.inputs import Input
from gpt_xp.jobs.job import Job, begin_job, model_digest, read_job
from gpt_xp.jobs.status import numbers_of

INPUT = Input("a", "/a", 5, 6, False, False)
JOB = Job("generate", "m", "sha256:0", "float32", None, {"max_tokens": 5}, "jsonl", 10, 1, (INPUT,))


def at_once(out: Path, count: int = 8) -> list[int]:
    """Begin the job in several threads at once; return the seed that each then has."""
    seeds: list[int] = []
    barrier = threading.Barrier(count)

    def begin(seed: int) -> None:
        barrier.wait()
        seeds.append(begin_job(out, replace(JOB, seed=seed), has_seed=False)[0].seed)

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seeds


@pytest.mark.parametrize("links", [True, False])
def test_of_several_at_once_one_writes_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", link)
    for turn in range(5):
        seeds = at_once(tmp_path / str(turn))
        assert len(seeds) == 8
        assert {*seeds} == {read_job(tmp_path / str(turn)).seed}
        assert os.listdir(tmp_path / str(turn)) == ["job.json"]


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    assert begin_job(tmp_path / "out", JOB, has_seed=True) == (JOB, True)
    assert begin_job(tmp_path / "out", JOB, has_seed=True) == (JOB, False)
    assert begin_job(tmp_path / "out", replace(JOB, seed=99), has_seed=False) == (JOB, False)
    assert begin_job(tmp_path / "out", replace(JOB, model="the same files"), has_seed=True) == (JOB, False)
    assert read_job(tmp_path / "out") == JOB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "score"}, "kind 'generate', not 'score'"),
        ({"dtype": "float64"}, "dtype 'float32', not 'float64'"),
        ({"quantize": "int8"}, "quantize None, not 'int8'"),
        ({"format": "parquet"}, "format 'jsonl', not 'parquet'"),
        ({"shard_bytes": 20}, "shard_bytes 10, not 20"),
        ({"seed": 2}, "seed 1, not 2"),
        ({"settings": {"max_tokens": 6}}, "max_tokens 5, not 6"),
        ({"digest": "sha256:123456789"}, "model 'm' (sha256:0), not 'm' (sha256:1234567)"),
        ({"inputs": (INPUT, INPUT)}, "inputs /a, not /a, /a"),
        ({"inputs": (replace(INPUT, size=7),)}, "/a of 5 bytes, not of 7 bytes"),
        (
            {"inputs": (replace(INPUT, mtime_ns=7),)},
            "/a of 6 ns (time of its last change), not of 7 ns (time of its last change)",
        ),
    ],
)
def test_another_job_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    begin_job(tmp_path, JOB, has_seed=True)
    with pytest.raises(SettingError) as caught:
        begin_job(tmp_path, replace(JOB, **changes), has_seed=True)
    assert str(caught.value).startswith(f"this job was begun with {message}: give what it was begun with to go on")
    assert read_job(tmp_path) == JOB


def test_a_folder_without_a_job_is_one_error(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "no"):
        with pytest.raises(SettingError, match=r"holds no bulk job: job\.json is missing there"):
            read_job(out)


@pytest.mark.parametrize("change", [{"version": 99}, {"unknown": 1}])
def test_a_job_of_another_version_is_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "job.json").write_text(json.dumps(JOB.as_dict() | change))
    with pytest.raises(SettingError, match="of another version of gpt-xp"):
        read_job(tmp_path)


def test_a_damaged_job_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (tmp_path / "job.json").write_text('{"kind": ')
    with pytest.raises(SettingError, match="is damaged: put it back"):
        read_job(tmp_path)


def test_where_nothing_can_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="file is a file, and a job writes to a directory"):
        begin_job(tmp_path / "file", JOB, has_seed=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*job\.json"):
        begin_job(tmp_path / "file" / "out", JOB, has_seed=True)


def test_the_digest_is_of_all_files_that_decide_the_text(tmp_path: Path, shakespeare: gpt_xp.Model) -> None:
    shakespeare.save(tmp_path)
    first = model_digest(tmp_path)
    assert model_digest(tmp_path) == first
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "training").mkdir()
    assert model_digest(tmp_path) == first
    for name in ("merges.txt", "vocab.json", "config.json", "model.safetensors"):
        with (tmp_path / name).open("ab") as file:
            file.write(b" ")
        before, first = first, model_digest(tmp_path)
        assert before != first, name


def test_slices_are_disjoint_and_complete() -> None:
    assert [*numbers_of(7)] == [*range(7)]
    assert [*numbers_of(7, from_end=True)] == [*range(7)][::-1]
    assert [*numbers_of(7, "3/3", from_end=True)] == [5, 2]
    for of in (1, 2, 5, 9):
        each = [number for part in range(1, of + 1) for number in numbers_of(7, f"{part}/{of}")]
        assert sorted(each) == [*range(7)]


@pytest.mark.parametrize("slice", ["0/64", "65/64", "1", "1/", "/2", "-1/2", "a/b", "1/0", ""])
def test_a_slice_that_does_not_exist_is_refused(slice: str) -> None:
    with pytest.raises(SettingError, match=r"^slice must be K/N, with K from 1 to N, such as 3/64, not"):
        numbers_of(7, slice)


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def full(path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(CheckpointError, match=r"make room|No space left"):
        begin_job(tmp_path / "out", JOB, has_seed=True)
    assert os.listdir(tmp_path / "out") == []
