"""`gpt-xp bulk`: its options, its messages, --status and --join."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Result, Terminal, posix

import gpt_xp
from gpt_xp.jobs.worker import Worker

pytestmark = pytest.mark.usefixtures("no_variables")
Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, shakespeare: gpt_xp.Model) -> None:
    """Run the workers here: tests/jobs has the tests of the engines."""

    def run_here(options: Any, numbers: Any, workers: int, gpus: int, watcher: Any) -> Any:
        worker = Worker(options)
        watcher.loaded(["a warning of the model"])
        watcher.loaded(["a warning of the model"])
        return (worker.run(number) for number in numbers)

    monkeypatch.setattr("gpt_xp.jobs.run._engine", lambda name: run_here)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Return the arguments of a job of four lines, one of them wrong."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "id": 1}\nwrong\n{"prompt": "c"}\n')
    options = ["-m", "shakespeare", "-n", "2", "--threads", "1", "--shard-bytes", "20"]
    return ["bulk", *options, str(tmp_path / "p.jsonl"), str(tmp_path / "out")]


def test_a_job_its_state_and_its_records(call: Call, job: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = call(*job)
    assert (result.code, result.out) == (1, "")
    warning, last, errors = result.err.splitlines()
    assert warning == "gpt-xp: a warning of the model"
    assert last.startswith(f"gpt-xp: 4 of 4 shards done in {out}; 4 prompts now in ")
    assert last.endswith(" prompts/s; 1 error record")
    assert errors == f"gpt-xp: 1 line could not be computed: `gpt-xp bulk --status {out}` names the parts"
    part = tmp_path / "out" / "000" / "part-000002.jsonl"
    shown = f"4 of 4 shards are done, 100.0% of the input\n1 error record:\n  {part}: 1\n"
    assert call("bulk", "--status", out) == (0, shown, "")
    state = json.loads(call("bulk", "--status", "--json", out).out)
    assert state == {
        "schema": 2, "directory": out, "shards": 4, "done": 4, "bytes": 63, "done_bytes": 63, "errors": {str(part): 1},
    }  # fmt: skip
    records = [json.loads(line) for line in call("bulk", "--join", out).out.splitlines()]
    assert [record["type"] for record in records] == ["result", "result", "error", "result"]
    assert records[1]["input"] == {"id": 1}
    part.unlink()
    assert call("bulk", "--status", out).out == "3 of 4 shards are done, 68.3% of the input\n"
    assert call("bulk", "--join", out) == (
        1, "", f"gpt-xp: error: 1 of 4 shards are missing in {out}: run the same command again, which goes on\n",
    )  # fmt: skip
    again = call(*job, "--json")
    assert again.code == 1
    assert again.err.splitlines()[0] == "gpt-xp: going on: 3 of 4 shards are done"
    found = json.loads(again.out)
    assert (found["shards"], found["done"], found["prompts"], found["errors"]) == (4, 4, 2, {str(part): 1})


def test_without_errors_the_code_is_0_and_the_seed_is_told(call: Call, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    job = ("bulk", "-m", "shakespeare", "-n", "1", "--threads", "1", "--temperature", "1", str(tmp_path / "p.txt"))
    result = call(*job, str(tmp_path / "out"))
    seed = json.loads((tmp_path / "out" / "job.json").read_text())["seed"]
    assert result.code == 0
    assert result.err.splitlines()[0] == f"gpt-xp: seed {seed}"
    assert call(*job, str(tmp_path / "out")).code == 0
    refused = call(*job, "--seed", str(seed + 1), str(tmp_path / "out"))
    message = (
        f"this job was begun with --seed {seed}, not {seed + 1}: give what it was begun with to go on, or write to"
    )
    assert refused == (1, "", f"gpt-xp: error: {message} another directory\n")
    assert "with --temperature 1.0, not 0.5" in call(*job, str(tmp_path / "out"), "--temperature", "0.5").err


def test_strict_says_the_line(call: Call, job: list[str], tmp_path: Path) -> None:
    result = call(*job, "--strict")
    assert result.code == 1
    assert f"gpt-xp: error: {tmp_path / 'p.jsonl'}, line 3: the line is not valid JSON" in result.err


def test_scores_and_choices(call: Call, tmp_path: Path) -> None:
    file, out = tmp_path / "c.jsonl", str(tmp_path / "out")
    file.write_text('{"prompt": "My lord", "choices": [" no", " man"]}\n')
    assert call("bulk", "-m", "shakespeare", "--score", "--convention", "lm-eval", str(file), out).code == 0
    assert json.loads(call("bulk", "--join", out).out)["perplexity"] > 1
    assert call("bulk", "-m", "shakespeare", "--choices", "--by", "byte", str(file), f"{out}2").code == 0
    assert json.loads(call("bulk", "--join", f"{out}2").out)["best"] in (0, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give at least one FILE of prompts, and the DIR to write to as the last argument"),
        (["FILE"], "give at least one FILE of prompts"),
        (["FILE", "out", "--score", "--choices"], "give --score or --choices, not both"),
        (["FILE", "out", "--score", "--top-k", "5"], "--top-k goes without --score and --choices"),
        (["FILE", "out", "--choices", "--window", "5"], "--window goes with --score"),
        (["FILE", "out", "--by", "byte"], "--by goes with --choices"),
        (["FILE", "out", "--temperature", "-1"], "--temperature must be 0 (greedy) or a number"),
        (["FILE", "out", "--shard-bytes", "0"], "'0' is not a size: expected a number of bytes, such as 500000, 64K"),
        (["FILE", "out", "--shard-bytes", "many"], "'many' is not a size"),
        (["FILE", "out", "--model", "a", "--models_dir", "b"], "give --model, or picoGPT's"),
        (["--status"], "--status takes the DIR of one job, not 0 paths"),
        (["--join", "a", "b"], "--join takes the DIR of one job, not 2 paths"),
        (["--join", "--status", "a"], "give --status or --join, not both"),
    ],
)
def test_wrong_usage_is_code_2_before_anything_is_read(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("bulk", *args)
    assert result.code == 2, result
    assert message in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.txt", "out"], "missing.txt cannot be read: No such file or directory"),
        (["-", "out"], "a job cannot read stdin, because it may read a file again: write the lines to a file"),
        (["p.txt", "out", "--slice", "0/64"], "--slice must be K/N, with K from 1 to N, such as 3/64, not '0/64'"),
        (["p.txt", "out", "--slice", "65/64"], "--slice must be K/N, with K from 1 to N, such as 3/64, not '65/64'"),
        (["p.txt", "out", "--score", "--window", "999"], "--window must be from 2 to 256"),
        (["--status", "."], ". holds no bulk job: job.json is missing there"),
    ],
)
def test_an_error_is_one_line_and_code_1(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    result = call("bulk", "-m", "shakespeare", *args)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"gpt-xp: error: {message}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "expected"), [("100", 100), ("64K", 65536), ("16M", 1 << 24), ("1GiB", 1 << 30), ("2 kb", 2048)]
)
def test_sizes(call: Call, tmp_path: Path, size: str, expected: int) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    call("bulk", "-m", "shakespeare", "-n", "1", "--shard-bytes", size, str(tmp_path / "p.txt"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "job.json").read_text())["shard_bytes"] == expected


def test_names_of_picogpt(call: Call, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    args = ("bulk", "-n", "1", "--models_dir", str(tmp_path), "--model_size", "shakespeare", str(tmp_path / "p.txt"))
    assert call(*args, str(tmp_path / "out"), GPT_XP_MODEL="no-such-model").code == 0


@posix
def test_a_terminal_shows_prompts_a_second_and_the_time_left(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ROMEO:\n" * 60)
    args = ("-m", "shakespeare", "-n", "30", "--threads", "1", "--shard-bytes", "50")
    terminal = Terminal("bulk", *args, str(tmp_path / "p.txt"), str(tmp_path / "out"))
    assert terminal.end() == 0
    assert "%|" in terminal.seen
    assert " prompts, " in terminal.seen
    assert "prompts/s" in terminal.seen


def test_a_call_that_computes_nothing_leaves_no_job(call: Call, tmp_path: Path) -> None:
    """Otherwise the corrected command would be refused."""
    (tmp_path / "prompts.txt").write_text("ROMEO:\n")
    args = ["bulk", "-m", "shakespeare", "-n", "3", str(tmp_path / "prompts.txt"), str(tmp_path / "out")]
    for wrong in (["--dtype", "float16"], ["--device", "cuda"], ["--mesh", "data=2"]):
        assert call(*args, *wrong).code == 1
        assert not (tmp_path / "out").exists()
    assert call(*args).code == 0
    result = call(*args[:-1], str(tmp_path / "prompts.txt"))
    assert (result.code, result.out) == (1, "")
    assert "prompts.txt is a file, and a job writes to a directory" in result.err
