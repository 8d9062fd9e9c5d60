"""The local engine: workers that crash, drivers that are killed, and Ctrl-C."""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, PATIENCE, Result, Terminal, children, posix, process, start

import gpt_xp
from gpt_xp.errors import BackendError, GptXpError
from gpt_xp.jobs import local_engine
from gpt_xp.jobs.parts import Parts
from gpt_xp.jobs.status import BulkStatus, join, status
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.jobs.worker import DEADLY

KILLS = int(os.environ.get("GPT_XP_TEST_KILLS", "2"))  # on each number of workers; 20 takes a minute
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")

# A worker that ends itself at lines that hold "deadly", and at its start as often as the file `starts` has bytes.
WORKER = """
import os, sys
from pathlib import Path
from gpt_xp.jobs import tasks, worker_process

folder = Path(sys.argv[1])
starts = folder / "starts"
if starts.exists() and (left := starts.read_bytes()):
    starts.write_bytes(left[1:])
    print("no library today", file=sys.stderr)
    sys.exit(3)
continue_ = tasks.Task._continue

def die(self, rows):
    if any("deadly" in row.text for row in rows):
        with open(folder / "deaths", "a") as file:
            file.write("x")
        os._exit(9)
    if any("bug" in row.text for row in rows):
        raise ValueError("a bug")
    return continue_(self, rows)

tasks.Task._continue = die
worker_process.main()
"""


class Spy(Watcher):
    def __init__(self) -> None:
        self.prompts = self.bytes = 0

    def advanced(self, prompts: int, n_bytes: int) -> None:
        self.prompts, self.bytes = self.prompts + prompts, self.bytes + n_bytes


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(local_engine, "COMMAND", [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)])
    return tmp_path


def prompts(tmp_path: Path, *more: str, count: int = 24) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"ROMEO {number}:\n" for number in range(count)) + "".join(f"{line}\n" for line in more))
    return path


def run(file: Path, out: Path, **options: Any) -> BulkStatus:
    return gpt_xp.bulk(
        [file], out, **{"model": "shakespeare", "seed": 7, "temperature": 1.0, "max_tokens": 4, "threads": 1} | options
    )


def joined(out: Path) -> bytes:
    return b"".join(join(out))


def leftovers(out: Path) -> list[Path]:
    return [each for each in out.rglob("*") if each.suffix in (".part", ".attempts")]


def test_a_shard_that_ends_its_worker_three_times_gets_errors_and_the_others_are_whole(crashing: Path) -> None:
    spy = Spy()
    file = prompts(crashing, "this one is deadly")
    found = run(file, crashing / "out", shard_bytes=100, workers=2, watcher=spy)
    assert (crashing / "deaths").read_text() == "xxx"
    assert found.is_complete
    records = joined(crashing / "out").decode().splitlines()
    assert len(records) == 25
    wrong = [record for record in records if '"type": "error"' in record]
    assert 1 <= len(wrong) == found.n_errors < 10
    assert all(DEADLY in record for record in wrong)
    assert (spy.prompts, spy.bytes) == (25, file.stat().st_size)
    assert leftovers(crashing / "out") == []


def test_a_worker_that_cannot_start_is_one_error(crashing: Path) -> None:
    (crashing / "starts").write_text("xx")
    assert run(prompts(crashing), crashing / "out").is_complete
    (crashing / "starts").write_text("xxx")
    with pytest.raises(GptXpError, match="has ended 3 times before it had loaded the model: no library today"):
        run(prompts(crashing), crashing / "other")


def test_a_bug_is_not_hidden(crashing: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a worker has failed:\nTraceback(.|\n)*ValueError: a bug"):
        run(prompts(crashing, "bug"), crashing / "out")


def test_a_model_that_fails_to_load_is_one_error(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(BackendError, match="numpy has no device 'cuda'"):
        run(prompts(tmp_path), tmp_path / "out", device="cuda", workers=2)
    assert time.monotonic() - begin < PATIENCE
    gc.collect()  # A process that was not waited for, or a pipe that is open, would be a warning here.
    assert not (tmp_path / "out").exists()  # Nothing was computed, and other settings may be given.


@linux
def test_a_script_without_a_guard_may_call_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    options = "model='shakespeare', max_tokens=1, workers=2, shard_bytes=100, threads=1"
    script.write_text(f"import gpt_xp\nprint(gpt_xp.bulk('prompts.txt', 'out', {options}).prompts)\n")
    prompts(tmp_path)
    result = process(command=[sys.executable, "-W", "error", str(script)], cwd=tmp_path)
    assert result == Result(0, "24\n", "")


# Killed


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def wait_for_end(pids: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in pids):
        assert time.monotonic() < end, "a worker has outlived its driver"
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("never-killed")
    file = prompts(folder, count=60 * KILLS)
    run(file, folder / "out", shard_bytes=150, max_tokens=60)
    return file, joined(folder / "out")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_at_random_it_ends_with_the_bytes_of_a_run_that_never_was(
    never_killed: tuple[Path, bytes], tmp_path: Path, workers: int
) -> None:
    """The driver or a worker is killed, each time after more was done; no part that is there is written again."""
    file, expected = never_killed
    options = ["-m", "shakespeare", "--seed", "7", "--temperature", "1", "-n", "60", "--threads", "1"]
    out, chance = tmp_path / "out", random.Random(workers)
    args = ["bulk", *options, "--shard-bytes", "150", "--workers", str(workers), str(file), str(out)]
    done: dict[Path, int] = {}

    def more_is_done() -> bool:
        assert driver.poll() is None, "the job is done before it was killed often enough"
        now = {part: part.stat().st_mtime_ns for part in out.rglob("*.jsonl")}
        assert now.items() >= done.items()
        more = len(now) > len(done)
        done.update(now)
        return more

    kills = 0
    while kills < KILLS:
        driver = start(*args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for victim in [*["worker"] * chance.randrange(3), "driver"][: KILLS - kills]:  # It outlives its workers.
            wait_until(more_is_done)
            time.sleep(chance.uniform(0, 0.05))
            pids = children(driver.pid)
            kill(chance.choice(pids) if victim == "worker" and pids else driver.pid)
            kills += 1
            if not pids:  # A worker that was killed is not started again yet, so the driver was killed.
                break
        kill(driver.pid)
        driver.wait(PATIENCE)
        wait_for_end(pids)
    assert not status(out).is_complete
    result = process(*args)
    assert result.code == 0, result.err
    assert joined(out) == expected
    assert leftovers(out) == []


@linux
def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    args = ["-m", "shakespeare", "-n", "200", "--threads", "1", "--workers", "2", "--shard-bytes", "100"]
    driver = start("bulk", *args, str(prompts(tmp_path)), str(tmp_path / "out"))
    while len(pids := children(driver.pid)) < 2:
        assert driver.poll() is None
        time.sleep(0.02)
    kill(driver.pid)
    driver.communicate()
    wait_for_end(pids)


@posix
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    file = prompts(tmp_path, count=60)
    args = ["bulk", "-m", "shakespeare", "-n", "100", "--threads", "1", "--shard-bytes", "100", "--workers", "2"]
    terminal = Terminal(*args, str(file), str(tmp_path / "out"), command=COMMAND)
    terminal.read("prompts/s")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "gpt-xp: stopped; the same command goes on" in terminal.seen
    assert "Traceback" not in terminal.seen
    assert not status(tmp_path / "out").is_complete


def test_gpus_of_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus: Callable[[int, int], dict[str, str]] = local_engine._visible_gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(3, 0) == {}
    assert gpus(0, 1) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert gpus(2, 2) == {"CUDA_VISIBLE_DEVICES": "4,5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-aa,3")
    assert gpus(1, 1) == {"CUDA_VISIBLE_DEVICES": "GPU-aa"}
    with pytest.raises(BackendError, match="worker 2 needs 2 GPUs beside those of the others, and CUDA_VISIBLE_DEV"):
        gpus(1, 2)


def test_parts_of_a_job_with_two_workers_are_those_of_one(tmp_path: Path) -> None:
    """The second job works on the same folder at the same time, from the end."""
    file = prompts(tmp_path, count=60)
    run(file, tmp_path / "one", shard_bytes=60)
    args = ["-m", "shakespeare", "--seed", "7", "--temperature", "1", "-n", "4", "--threads", "1"]
    command = ["bulk", *args, "--shard-bytes", "60", str(file), str(tmp_path / "two")]
    other = start(*command, "--from-end")
    result = process(*command, "--batch-size", "3")
    _, err = other.communicate(timeout=PATIENCE)
    assert (result.code, other.returncode) == (0, 0), (result.err, err)
    assert joined(tmp_path / "two") == joined(tmp_path / "one")
    assert Parts(tmp_path / "two", "jsonl").scan()[1] == {}
