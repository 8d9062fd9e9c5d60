"""Records of bulk jobs: the same bytes whatever the batch size, the backend and the shards that are done already."""

import errno
import gzip
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Result
from libraries import skipping_what_is_missing

import gpt_xp
from gpt_xp.errors import (
    CheckpointError,
    DeviceMemoryError,
    GptXpError,
    NumericalError,
    PromptError,
    SettingError,
    TextError,
)
from gpt_xp.jobs import inputs, worker
from gpt_xp.jobs.job import model_digest, model_stamp
from gpt_xp.jobs.parts import Parts
from gpt_xp.jobs.status import BulkStatus, join, status
from gpt_xp.jobs.tasks import Task
from gpt_xp.jobs.writers import count_errors

Bulk = Callable[..., BulkStatus]
Lines = Callable[..., list[dict[str, Any]]]
TOO_LONG = "x " * 300
SAMPLED = {"temperature": 0.9, "top_k": 40}


def joined(tmp_path: Path, out: str) -> bytes:
    return b"".join(join(tmp_path / out))


# What is written


def test_each_line_is_continued_with_its_own_seed(
    run: Bulk, lines_of: Lines, prompts: Path, one_thread: gpt_xp.Model
) -> None:
    found = run(prompts, shard_bytes=100, num_samples=2, **SAMPLED)
    text = prompts.read_bytes()
    assert (found.shards, found.done, found.n_errors) == (-(-len(text) // 100), found.shards, 0)
    assert found.prompts == 30
    records = lines_of()
    assert len(records) == 60
    assert [record["sample"] for record in records] == [0, 1] * 30
    for record, line in zip(records[::2], text.decode().splitlines(), strict=True):
        assert (record["type"], record["file"], record["prompt"]) == ("result", str(prompts), line)
        assert text[record["offset"] :].decode().splitlines()[0] == line
    assert len({record["seed"] for record in records}) == 30
    for record in records[::7]:
        alone = one_thread.generate(record["prompt"], max_tokens=5, num_samples=2, seed=record["seed"], **SAMPLED)
        assert record["text"] == alone[record["sample"]].text
        assert record["token_ids"] == alone[record["sample"]].token_ids
        assert record["finish_reason"] == "max_tokens"


def test_the_command_gives_the_same_text_for_the_seed_of_a_record(
    run: Bulk, lines_of: Lines, prompts: Path, call: Callable[..., Result]
) -> None:
    run(prompts, **SAMPLED)
    record = lines_of()[17]
    options = ("-m", "shakespeare", "-n", "5", "--temperature", "0.9", "--top-k", "40", "--seed", str(record["seed"]))
    assert call(*options, record["prompt"]).out == record["text"] + "\n"


def test_the_bytes_depend_on_nothing_that_may_change(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    run(prompts, **SAMPLED)
    expected = joined(tmp_path, "out")
    for out, options in {
        "b1": {"batch_size": 1},
        "b7": {"batch_size": 7},
        "shards": {"shard_bytes": 61},
        "end": {"shard_bytes": 61, "from_end": True},
    }.items():
        run(prompts, out=out, **SAMPLED, **options)
        assert joined(tmp_path, out) == expected, out


def test_windows_limit_what_is_in_memory(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prompts, out="whole", **SAMPLED)
    monkeypatch.setattr(worker, "WINDOW", 4)
    given: list[int] = []
    original = Task.outcomes
    monkeypatch.setattr(
        Task, "outcomes", lambda self, lines, seeds: [given.append(len(lines)), *original(self, lines, seeds)][1:]
    )
    run(prompts, **SAMPLED)
    assert given == [4] * 7 + [2]
    assert joined(tmp_path, "out") == joined(tmp_path, "whole")


def test_another_backend_and_batch_size_halfway_give_the_same_texts(
    run: Bulk, lines_of: Lines, prompts: Path, tmp_path: Path
) -> None:
    with skipping_what_is_missing("jax"):
        import jax  # noqa: F401
    run(prompts, shard_bytes=200, **SAMPLED)
    expected = joined(tmp_path, "out")
    parts = Parts(tmp_path / "out", "jsonl")
    for number in (1, 2):
        parts.part(number).unlink()
    found = run(prompts, shard_bytes=200, backend="jax", batch_size=5, **SAMPLED)
    assert 0 < found.prompts < 30
    assert joined(tmp_path, "out") == expected


def test_greedy_texts_have_no_seed_and_logprobs_come_when_asked(
    run: Bulk, lines_of: Lines, prompts: Path, one_thread: gpt_xp.Model
) -> None:
    run(prompts, logprobs=True)
    record = lines_of()[3]
    alone = one_thread.generate(record["prompt"], max_tokens=5)
    assert record["text"] == alone.text
    assert record["logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)
    assert "seed" not in record


def test_fields_come_back_and_several_files_go_on(run: Bulk, lines_of: Lines, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.gz"))
    first.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo")
    second.write_text('{"prompt": "three", "id": 7, "tags": ["x", {"y": null}]}\n{"prompt": ""}\n')
    third.write_bytes(gzip.compress(b"four\nfive\n"))
    run(first, second, third, shard_bytes=10)
    records = lines_of()
    assert [(Path(record["file"]).name, record["offset"], record["prompt"]) for record in records] == [
        ("a.txt", 0, "one"), ("a.txt", 12, "two"), ("b.jsonl", 0, "three"), ("b.jsonl", 57, ""),
        ("c.gz", 0, "four"), ("c.gz", 5, "five"),
    ]  # fmt: skip
    assert [record.get("input") for record in records] == [
        None, None, {"id": 7, "tags": ["x", {"y": None}]}, {}, None, None,
    ]  # fmt: skip


def test_scores(run: Bulk, lines_of: Lines, tmp_path: Path, one_thread: gpt_xp.Model) -> None:
    file = tmp_path / "t.jsonl"
    texts = ["To be, or not to be", "ROMEO: " * 300, "My lord"]
    file.write_text("".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(texts)))
    with file.open("a") as more:
        more.write('{"prompt": "as for generate"}\n{"text": ""}\n{"text": 1}\n')
    found = run(file, kind="score", convention="lm-eval", logprobs=True)
    *records, empty, wrong = lines_of()
    for record, text in zip(records, [*texts, "as for generate"], strict=True):
        score = one_thread.score(text, convention="lm-eval")
        assert record["text"] == text
        assert record["logprob"] == pytest.approx(score.logprob, abs=1e-3)
        assert (record["tokens"], record["bytes"]) == (len(score.token_ids), score.n_bytes)
        assert record["bits_per_byte"] == pytest.approx(score.bits_per_byte, abs=1e-4)
        assert [each["id"] for each in record["per_token"]] == score.token_ids.tolist()
    assert [record["input"] for record in records[:3]] == [{"id": 0}, {"id": 1}, {"id": 2}]
    assert empty["error"] == "the text is empty: there is nothing to score"
    assert wrong["error"].startswith('expected a JSON object with a text "text" or "prompt", not {"text": 1}')
    assert found.n_errors == 2


def test_choices(run: Bulk, lines_of: Lines, tmp_path: Path, one_thread: gpt_xp.Model) -> None:
    file, choices = tmp_path / "c.jsonl", [" lord", " banana", " father"]
    file.write_text(
        json.dumps({"prompt": "My", "choices": choices, "gold": 0}) + "\n" + '{"prompt": "a", "choices": []}\n'
        '{"prompt": "a"}\n{"prompt": "a", "choices": ["b", ""]}\n' + json.dumps({"prompt": TOO_LONG, "choices": ["a"]})
    )
    run(file, kind="choices", by="byte")
    record, *errors = lines_of()
    ranked = one_thread.rank("My", choices, by="byte")
    assert record["best"] == ranked[0].index
    assert [choice["index"] for choice in record["choices"]] == [each.index for each in ranked]
    assert [choice["choice"] for choice in record["choices"]] == [each.choice for each in ranked]
    for name in ("logprob", "logprob_per_token", "logprob_per_byte"):
        expected = [getattr(each, name) for each in ranked]
        assert [choice[name] for choice in record["choices"]] == pytest.approx(expected, abs=1e-4)
    assert record["input"] == {"gold": 0}
    messages = [error["error"] for error in errors]
    assert all(message.startswith('expected "choices", a list of texts that are not empty') for message in messages[:3])
    assert "this model takes 256" in messages[3]


# Lines that cannot be computed

BAD = [
    ("nope", "the line is not valid JSON"),
    ('{"x": 1}', 'expected a JSON object with a text "prompt"'),
    (json.dumps({"prompt": TOO_LONG}), "the prompt has 600 tokens, and the context of this model holds 256"),
    ('{"prompt": "\\ud800"}', "lone surrogate"),
    ('{"prompt": "a", "x": NaN}', "JSON has no NaN"),
    ('{"prompt": "a", "seed": 1}', '"seed" is the name of an option, and a line cannot set it'),
    ('{"prompt": "\udcff"}', "the line is not UTF-8 text"),
    (json.dumps({"prompt": "y" * 3000}), "the line has more than 2000 bytes"),
]


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("gpt_xp.jobs.shards.MAX_LINE_BYTES", 2000)
    path = tmp_path / "bad.jsonl"
    good = '{"prompt": "My lord"}'
    path.write_bytes("\n".join([good, *(line for line, _ in BAD), good]).encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 50, "batch_size": 1}])
def test_a_bad_line_is_an_error_in_its_place(
    run: Bulk, lines_of: Lines, bad: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    found = run(bad, **options)
    first, *errors, last = lines_of()
    assert first["type"] == last["type"] == "result"
    assert first["text"] == last["text"]
    assert [error["type"] for error in errors] == ["error"] * len(BAD)
    for error, (_, message) in zip(errors, BAD, strict=True):
        assert message in error["error"]
    assert found.n_errors == len(BAD)
    assert sum(found.errors.values()) == len(BAD)
    assert all(Path(path).exists() for path in found.errors)
    assert status(tmp_path / "out").errors == found.errors
    again = run(bad, **options)
    assert (again.n_errors, again.prompts) == (len(BAD), 0)


def test_strict_ends_at_the_first_bad_line_and_says_where(run: Bulk, bad: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"bad\.jsonl, line 2: the line is not valid JSON"):
        run(bad, strict=True)
    bad.write_text('{"prompt": "a"}\n\n' + json.dumps({"prompt": TOO_LONG}))
    with pytest.raises(PromptError, match=r"bad\.jsonl, line 3: the prompt has 600 tokens"):
        run(bad, out="other", strict=True)
    assert status(tmp_path / "other").done == 0


def test_an_object_among_texts_is_an_error(run: Bulk, lines_of: Lines, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text('plain\n{"prompt": "a"}\n[1]\n')
    run(path)
    assert [record["type"] for record in lines_of()] == ["result", "error", "result"]
    assert "is a JSON object, and the first line of the file is not" in lines_of()[1]["error"]


@pytest.mark.parametrize("error", [NumericalError, DeviceMemoryError])
@pytest.mark.parametrize("kind", ["generate", "score"])
def test_a_line_at_which_the_model_fails_is_alone_to_fail(
    run: Bulk, lines_of: Lines, prompts: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], kind: str
) -> None:
    method = {"generate": "generate", "score": "score_each"}[kind]
    original = getattr(gpt_xp.Model, method)

    def fail(model: gpt_xp.Model, given: Any, *args: Any, **options: Any) -> Any:
        if "ROMEO 13: my lord my lord my lord" in ([given] if isinstance(given, str) else given):
            raise error("no numbers")
        return original(model, given, *args, **options)

    monkeypatch.setattr(gpt_xp.Model, method, fail)
    assert run(prompts, kind=kind).n_errors == 1
    assert [n for n, record in enumerate(lines_of()) if record["type"] == "error"] == [13]
    assert lines_of()[13]["error"] == "no numbers"


def test_an_error_of_all_lines_ends_the_job(
    run: Bulk, prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(model: gpt_xp.Model, *args: Any, **options: Any) -> Any:
        raise SettingError("this is wrong for every line")

    monkeypatch.setattr(gpt_xp.Model, "generate", fail)
    with pytest.raises(SettingError, match="this is wrong for every line"):
        run(prompts)
    assert status(tmp_path / "out").done == 0


@pytest.mark.parametrize("error", [DeviceMemoryError, NumericalError])
def test_a_machine_at_which_all_lines_fail_ends_the_job(
    run: Bulk, prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    """Otherwise a GPU that another process fills would give a job of errors."""

    def fail(model: gpt_xp.Model, *args: Any, **options: Any) -> Any:
        raise error("it has failed")

    with monkeypatch.context() as patch:
        patch.setattr(gpt_xp.Model, "generate", fail)
        with pytest.raises(error, match="it has failed"):
            run(prompts, shard_bytes=100)
    assert status(tmp_path / "out").done == 0
    assert run(prompts, shard_bytes=100).n_errors == 0


def test_a_part_with_errors_does_not_replace_a_good_one(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    """Two jobs compute a shard; the one that ends first has no errors, and the other has given the shard up."""
    run(prompts)
    parts = Parts(tmp_path / "out", "jsonl")
    good = parts.part(0).read_bytes()
    (tmp_path / "aside").write_bytes(b'{"type": "error"}\n' * 30)
    parts.put(str(tmp_path / "aside"), 0, 30)
    assert parts.part(0).read_bytes() == good
    assert status(tmp_path / "out").errors == {}
    # The other way round, the errors that are there are counted.
    parts.part(0).unlink()
    parts.put(str(tmp_path / "aside"), 0, 30)
    parts.put(str(tmp_path / "aside"), 0, 0)
    assert status(tmp_path / "out").n_errors == 30


def test_the_error_records_of_parquet_are_counted(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    with skipping_what_is_missing("pyarrow"):
        import pyarrow  # noqa: F401
    prompts.write_text("ROMEO:\n" + TOO_LONG + "\nTo be\n" + TOO_LONG + "\n")
    assert run(prompts, format="parquet").n_errors == 2
    assert count_errors(Parts(tmp_path / "out", "parquet").part(0), "parquet") == 2


def test_the_bytes_that_the_watcher_hears_of_are_those_of_the_files(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gzip.open(tmp_path / "more.gz", "wb") as file:
        file.write(prompts.read_bytes() * 20)
    told: list[int] = []
    original = worker.Worker.run
    monkeypatch.setattr(
        worker.Worker, "run", lambda self, number: original(self, number, lambda n, n_bytes: told.append(n_bytes))
    )
    run(tmp_path / "more.gz")
    assert 0 < sum(told) <= (tmp_path / "more.gz").stat().st_size


def test_numbers_of_numpy_are_numbers(run: Bulk, prompts: Path, lines_of: Lines) -> None:
    import numpy as np

    run(prompts, max_tokens=np.int64(2), temperature=np.float32(0.5), shard_bytes=np.int32(1000))
    assert len(lines_of()[0]["token_ids"]) == 2


# A shard that ends its worker


def test_a_shard_that_has_ended_its_worker_three_times_gets_errors(
    run: Bulk, lines_of: Lines, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_xp.jobs.run.secrets.token_hex", lambda n: "this-run")
    run(prompts, shard_bytes=200, out="whole")
    for before in (2, 3):
        run(prompts, shard_bytes=200)
        parts = Parts(tmp_path / "out", "jsonl")
        parts.part(1).unlink()
        attempts = tmp_path / "out" / "000" / "part-000001.attempts"
        attempts.write_text("another-run\n" * 20 + "this-run\n" * before)
        found = run(prompts, shard_bytes=200)
        assert not attempts.exists()
        assert (found.n_errors > 0) == (before == 3)
    whole, records = lines_of("whole"), lines_of()
    assert len(whole) == len(records)
    for record, good in zip(records, whole, strict=True):
        assert record == good or record["error"] == worker.DEADLY
        assert record["offset"] == good["offset"]


def test_shards_that_end_all_workers_end_the_job(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Parts, "begin_attempt", lambda self, number, run: (tmp_path / "out/000").mkdir(exist_ok=True) or 3
    )
    with pytest.raises(GptXpError, match="3 shards in a row, the last of them 2, have each ended their worker three"):
        run(prompts, shard_bytes=100)
    monkeypatch.setattr(Parts, "begin_attempt", lambda self, number, run: 7)
    with pytest.raises(PromptError, match="shard 3 ends its worker even when it is only read: take its lines out"):
        run(prompts, shard_bytes=100)


# Going on


def test_what_is_there_is_not_done_again(run: Bulk, prompts: Path, tmp_path: Path, one_thread: gpt_xp.Model) -> None:
    run(prompts, shard_bytes=100, **SAMPLED)
    expected = joined(tmp_path, "out")
    part = Parts(tmp_path / "out", "jsonl").part(2)
    times = {each: each.stat().st_mtime_ns for each in part.parent.iterdir()}
    part.unlink()
    found = run(prompts, shard_bytes=100, **SAMPLED)
    assert 0 < found.prompts < 30
    assert joined(tmp_path, "out") == expected
    assert [each for each, time in times.items() if each.stat().st_mtime_ns != time] == [part]
    again = run(prompts, shard_bytes=100, seed=None, **SAMPLED)  # The seed is that of the job.
    assert again.prompts == 0


def test_the_seed_is_drawn_once(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    run(prompts, seed=None, **SAMPLED)
    run(prompts, seed=None, out="other", **SAMPLED)
    seeds = [json.loads((tmp_path / out / "job.json").read_text())["seed"] for out in ("out", "other")]
    assert seeds[0] != seeds[1]
    run(prompts, seed=seeds[1], out="third", **SAMPLED)
    assert joined(tmp_path, "third") == joined(tmp_path, "other")
    with pytest.raises(SettingError, match=f"begun with seed {seeds[0]}, not {seeds[1]}"):
        run(prompts, seed=seeds[1], **SAMPLED)


def test_another_worker_may_be_first(run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job from the end on the same folder: each shard that it has done is looked for before it is begun."""
    run(prompts, shard_bytes=100, out="whole", **SAMPLED)
    seen: list[int] = []
    original = worker.Worker.run

    def and_the_other(self: worker.Worker, number: int, *advance: Any) -> Any:
        if not seen:
            monkeypatch.setattr(worker.Worker, "run", original)
            run(prompts, shard_bytes=100, from_end=True, slice="2/2", **SAMPLED)
        seen.append(number)
        return original(self, number, *advance)

    monkeypatch.setattr(worker.Worker, "run", and_the_other)
    found = run(prompts, shard_bytes=100, **SAMPLED)
    assert found.prompts < 30
    assert joined(tmp_path, "out") == joined(tmp_path, "whole")


def test_a_part_that_another_worker_has_just_written_is_no_error(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ended its job meanwhile, and removed our file as one that a killed worker had left."""
    run(prompts, out="whole", **SAMPLED)
    replace_file = os.replace

    def other_first(source: str, target: str) -> None:
        if str(target).endswith("part-000000.jsonl"):
            os.remove(source)
            shutil.copy(Parts(tmp_path / "whole", "jsonl").part(0), target)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", other_first)
    run(prompts, **SAMPLED)
    assert joined(tmp_path, "out") == joined(tmp_path, "whole")


def test_slices_make_the_whole(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    run(prompts, shard_bytes=100, out="whole", **SAMPLED)
    for part in (2, 3, 1):
        found = run(prompts, shard_bytes=100, slice=f"{part}/3", **SAMPLED)
        assert found.is_complete
        assert found.shards < status(tmp_path / "out").shards
    assert joined(tmp_path, "out") == joined(tmp_path, "whole")


def test_leftovers_of_killed_workers_are_removed_at_the_end(run: Bulk, prompts: Path, tmp_path: Path) -> None:
    run(prompts, shard_bytes=100)
    folder = tmp_path / "out" / "000"
    expected = sorted(folder.iterdir())
    for name in ("part-000001.jsonl.1a2b3c4d.part", "part-000001.attempts"):
        (folder / name).write_text("half a rec")
    Parts(tmp_path / "out", "jsonl").part(1).unlink()
    run(prompts, shard_bytes=100)
    assert sorted(folder.iterdir()) == expected


def test_a_full_disk_is_one_error_and_loses_nothing(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prompts, shard_bytes=100, out="whole", **SAMPLED)
    written: list[int] = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"cannot write .*jsonl \(No space left on device\); it needs 100 bytes"
        ):
            run(prompts, shard_bytes=100, **SAMPLED)
    found = status(tmp_path / "out")
    assert 0 < found.done < found.shards
    with pytest.raises(CheckpointError, match=f"{found.shards - found.done} of {found.shards} shards are missing in"):
        join(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part"))
    run(prompts, shard_bytes=100, **SAMPLED)
    assert joined(tmp_path, "out") == joined(tmp_path, "whole")


def test_names_have_a_folder_for_each_thousand(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "jsonl")
    assert parts.part(12) == tmp_path / "000" / "part-000012.jsonl"
    assert parts.part(1_234_567) == tmp_path / "1234" / "part-1234567.jsonl"
    for number in (0, 999, 1000, 1_234_567):
        parts.begin_attempt(number, "run")
        parts.part(number).write_text("")
    parts.write_errors(999, 4)
    parts.write_errors(5, 4)  # Its part was never renamed.
    assert parts.scan() == ({0, 999, 1000, 1_234_567}, {999: 4})


# Parquet


def test_parquet_has_the_same_records(run: Bulk, lines_of: Lines, prompts: Path, tmp_path: Path) -> None:
    with skipping_what_is_missing("pyarrow"):
        import pyarrow.dataset
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"prompt": "a", "id": 1}\n{"prompt": "\\ud800"}\n{"x": 1}\n')
    options = {"shard_bytes": 200, "logprobs": True, **SAMPLED}
    run(prompts, bad, out="lines", **options)
    found = run(prompts, bad, format="parquet", **options)
    rows = pyarrow.dataset.dataset(tmp_path / "out", exclude_invalid_files=True).to_table().to_pylist()
    assert len(rows) == 33
    assert found.n_errors == 2
    for row, record in zip(rows, lines_of("lines"), strict=True):
        row["input"] = row["input"] and json.loads(row["input"])
        shown = {name: value for name, value in row.items() if value is not None}
        expected = {name: value for name, value in record.items() if value is not None}
        if record["prompt"] == "\ud800":
            expected["prompt"] = "?"  # Parquet holds no lone surrogate.
        assert shown == expected
    with pytest.raises(SettingError, match=r"are parquet, which is not joined as text: read all of them in order with"):
        join(tmp_path / "out")


@pytest.mark.parametrize("kind", ["score", "choices"])
def test_parquet_of_other_kinds(run: Bulk, tmp_path: Path, kind: str) -> None:
    with skipping_what_is_missing("pyarrow"):
        import pyarrow.dataset
    file = tmp_path / "f.jsonl"
    file.write_text('{"prompt": "My lord", "choices": [", no", " man"]}\n')
    run(file, kind=kind, format="parquet", logprobs=True)
    [row] = pyarrow.dataset.dataset(tmp_path / "out", exclude_invalid_files=True).to_table().to_pylist()
    assert len(json.loads(row["per_token" if kind == "score" else "choices"])) == 2


@pytest.mark.parametrize(("option", "module"), [("format", "pyarrow"), ("engine", "ray")])
def test_without_an_extra_there_is_one_error_before_anything_is_loaded(
    run: Bulk, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    value = "parquet" if option == "format" else "ray"
    with pytest.raises(SettingError, match=rf"^{option} {value} needs {module}, which is not installed: pip install"):
        run(prompts, model="no-such-model", **{option: value})
    assert not (tmp_path / "out").exists()


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "translate"}, SettingError, "kind must be one of generate, score, choices, not 'translate'"),
        ({"engine": "spark"}, SettingError, "engine must be one of local, ray, not 'spark'"),
        ({"format": "csv"}, SettingError, "format must be one of jsonl, parquet, not 'csv'"),
        ({"workers": 0}, SettingError, "workers must be a whole number of at least 1, not 0"),
        ({"batch_size": 0}, SettingError, "batch_size must be"),
        ({"shard_bytes": 0}, SettingError, "shard_bytes must be"),
        ({"gpus": -1}, SettingError, "gpus must be"),
        ({"seed": [1, 2]}, SettingError, "seed must be one whole number"),
        ({"seed": -1}, SettingError, "seed must be a whole number from 0"),
        ({"slice": "65/64"}, SettingError, "slice must be K/N"),
        ({"dtype": "int8"}, SettingError, "dtype must be one of"),
        ({"quantize": "int2"}, SettingError, "int2"),
        ({"backend": "nump"}, GptXpError, "there is no backend 'nump'"),
        ({"model": "no-such"}, GptXpError, "no-such"),
        ({"top_k": -1}, SettingError, "top_k must be"),
        ({"kind": "score", "convention": "nanogpt"}, SettingError, "convention must be huggingface or lm-eval"),
        ({"kind": "score", "window": 1}, SettingError, "window must be"),
        ({"kind": "choices", "by": "word"}, SettingError, "by must be one of total, token, byte"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    run: Bulk, prompts: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        run(prompts, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_option_that_does_not_exist_is_a_type_error(run: Bulk, prompts: Path) -> None:
    with pytest.raises(TypeError, match="no option 'tempature'; the nearest is 'temperature'"):
        run(prompts, tempature=1)
    with pytest.raises(TypeError, match="a job of kind 'score' has no setting 'top_k'"):
        run(prompts, kind="score", top_k=1)


def test_no_files_and_a_single_name(run: Bulk, here: None, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="there is nothing to read"):
        run()
    with pytest.raises(TextError):
        run(tmp_path / "missing")
    assert gpt_xp.bulk(str(prompts), tmp_path / "out", model="shakespeare", max_tokens=1).prompts == 30


def test_a_model_on_another_machine_must_be_the_same(here: None, tmp_path: Path) -> None:
    [source] = inputs.find_inputs([Path(__file__)], "generate")
    job = worker.Job("generate", "shakespeare", "sha256:0", "float32", None, {}, "jsonl", 10, 1, (source,))
    options = worker.WorkerOptions(out="", folder="/nowhere", run="")
    with pytest.raises(CheckpointError, match="is another model than that of the job: put that model there"):
        LOAD_MODEL(job, options)
    folder = gpt_xp.hub.find.BUNDLED / "shakespeare"
    with pytest.raises(CheckpointError, match="another model"):
        LOAD_MODEL(job, replace(options, folder=str(folder)))
    # The files are hashed again only where one has another time or size.
    assert LOAD_MODEL(job, replace(options, folder=str(folder), stamp=model_stamp(folder))).config.n_ctx == 256
    assert (
        LOAD_MODEL(replace(job, digest=model_digest(folder)), replace(options, folder=str(folder))).config.n_ctx == 256
    )


LOAD_MODEL = worker.load_model  # before a fixture replaces it
