"""The Ray engine: a cluster of this machine with two workers, whose workers and driver are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PATIENCE, process, start

import gpt_xp
from gpt_xp.jobs.status import join, status
from gpt_xp.jobs.worker import DEADLY

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_variables")]
OPTIONS = ["-m", "shakespeare", "--seed", "7", "--temperature", "1", "-n", "12", "--shard-bytes", "300"]


@pytest.fixture(scope="module")
def by_local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a file of prompts, and the records that the local engine writes."""
    folder = tmp_path_factory.mktemp("local")
    file = folder / "prompts.txt"
    file.write_text("".join(f"ROMEO {number}:\n" for number in range(300)))
    options = {"seed": 7, "temperature": 1.0, "max_tokens": 12, "shard_bytes": 300}
    gpt_xp.bulk([file], folder / "out", model="shakespeare", **options)
    return file, b"".join(join(folder / "out"))


def command(file: Path, out: Path, *more: str, workers: int = 2) -> list[str]:
    return ["bulk", *OPTIONS, "--engine", "ray", "--workers", str(workers), *more, str(file), str(out)]


def joined(out: Path) -> bytes:
    return b"".join(join(out))


# Processes and sockets, as Linux shows them


def text_of(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in map(int, text_of(task / "children").split()):
            found += [child, *descendants(child)]
    return found


def named(pids: list[int], name: str) -> list[int]:
    return [pid for pid in pids if name in text_of(Path(f"/proc/{pid}/cmdline"))]


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, in hexadecimal, on which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in text_of(Path(table)).splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "0000000000000000FFFF00000100007F",  # the same in IPv6
    "00000000000000000000000001000000",  # ::1
}


def wait_until(happens: Callable[[], object], driver: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end
        assert driver is None or driver.poll() is None
        time.sleep(0.05)


def n_parts(out: Path) -> int:
    return len(list(out.rglob("*.jsonl")))


def is_gone(pid: int) -> bool:
    return text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] in ([], ["Z"])


# Tests


def test_the_bytes_are_those_of_the_local_engine_and_only_loopback_listens(
    by_local: tuple[Path, bytes], tmp_path: Path
) -> None:
    file, expected = by_local
    driver = start(*command(file, tmp_path / "out"))
    addresses: set[str] = set()
    pids: set[int] = set()
    while driver.poll() is None:
        now = [driver.pid, *descendants(driver.pid)]
        pids |= {*now}
        addresses |= listening(now)
        time.sleep(0.3)
    out, err = driver.communicate()
    assert (driver.returncode, out) == (0, b""), err
    assert b"shards done in" in err
    assert addresses
    assert addresses <= LOOPBACK
    assert joined(tmp_path / "out") == expected
    wait_until(lambda: all(map(is_gone, pids)))


def test_a_killed_worker_loses_nothing(by_local: tuple[Path, bytes], tmp_path: Path) -> None:
    file, expected = by_local
    driver = start(*command(file, tmp_path / "out"))
    wait_until(lambda: n_parts(tmp_path / "out") >= 2, driver)
    workers = named(descendants(driver.pid), "ray::MapWorker")
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err
    assert joined(tmp_path / "out") == expected


def test_a_killed_driver_loses_one_shard_a_worker_at_most(by_local: tuple[Path, bytes], tmp_path: Path) -> None:
    file, expected = by_local
    driver = start(*command(file, tmp_path / "out"))
    wait_until(lambda: n_parts(tmp_path / "out") >= 2, driver)
    pids = descendants(driver.pid)
    driver.kill()
    driver.communicate()
    wait_until(lambda: all(map(is_gone, pids)))
    before = {part: part.stat().st_mtime_ns for part in (tmp_path / "out").rglob("*.jsonl")}
    result = process(*command(file, tmp_path / "out"))
    assert result.code == 0, result.err
    assert joined(tmp_path / "out") == expected
    assert all(part.stat().st_mtime_ns == time for part, time in before.items())


def test_a_shard_that_ends_its_worker_three_times_gets_errors(tmp_path: Path) -> None:
    file, out = tmp_path / "long.txt", tmp_path / "out"
    file.write_text("ROMEO:\n" * 40)
    driver = start(*command(file, out, "-n", "250", "--batch-size", "1", workers=1))
    killed: set[int] = set()

    def begun() -> int:
        lines = text_of(out / "000" / "part-000000.attempts").split()
        return sum(not line.startswith("loading") for line in lines)

    for number in (1, 2, 3):
        wait_until(lambda n=number: begun() == n, driver)
        [worker] = [pid for pid in named(descendants(driver.pid), "ray::MapWorker") if pid not in killed]
        killed.add(worker)
        os.kill(worker, signal.SIGKILL)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1, err
    assert joined(out).decode().count(DEADLY) == 40
    assert status(out).n_errors == 40


def test_a_model_that_fails_to_load_is_one_error(by_local: tuple[Path, bytes], tmp_path: Path) -> None:
    result = process(*command(by_local[0], tmp_path / "out", "--device", "cuda"))
    assert result.code == 1
    assert "gpt-xp: error: numpy has no device 'cuda'" in result.err
    assert "Traceback" not in result.err


def test_a_cluster_that_the_user_has_started_is_used_and_stays(by_local: tuple[Path, bytes], tmp_path: Path) -> None:
    file, expected = by_local
    script = f"""
import os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray
import gpt_xp
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
before = dict(os.environ)
options = dict(model="shakespeare", seed=7, temperature=1.0, max_tokens=12, shard_bytes=300)
found = gpt_xp.bulk({str(file)!r}, {str(tmp_path / "out")!r}, engine="ray", workers=2, **options)
assert ray.is_initialized()
assert dict(os.environ) == before
print(found.prompts, ray.data.DataContext.get_current().enable_progress_bars)
"""
    result = process(command=[sys.executable, "-c", script])
    assert result.out.splitlines()[-1:] == ["300 True"], result.err
    assert joined(tmp_path / "out") == expected


def test_a_worker_for_which_there_is_no_place_is_one_error(tmp_path: Path) -> None:
    """Ray would wait for ever, without a word."""
    (tmp_path / "prompts.txt").write_text("ROMEO:\n")
    result = process(*command(tmp_path / "prompts.txt", tmp_path / "out", "--gpus", "1", workers=1))
    assert result.code == 1
    assert "error: a worker asks for 1 CPUs (--threads) and 1 GPUs (--gpus), and Ray has " in result.err
    many = str(4 * (os.cpu_count() or 1))
    assert process(*command(tmp_path / "prompts.txt", tmp_path / "out", "--threads", many, workers=1)).code == 0
