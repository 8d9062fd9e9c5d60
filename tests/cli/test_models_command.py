"""`gpt-xp models`, and downloads as the command shows them: in processes of their own, on terminals, when killed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_published
from commands import PATIENCE, Result, Terminal, posix, process, start
from servers import reset, status
from small_published import path_of

from gpt_xp.environment import gpt_xp_home
from gpt_xp.hub.published import MODELS

WEIGHTS = "model.safetensors"
pytestmark = pytest.mark.usefixtures("no_variables")
GPT_XP = small_published.command("124M")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models" / "124M" / "hub"


def finished(running: subprocess.Popen[bytes]) -> Result:
    out, err = running.communicate(timeout=PATIENCE)
    return Result(running.returncode, out.decode(), err.decode())


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_table(call, server, folder):
    before = call("models")
    assert before == call("models", "list")
    lines = before.out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [*MODELS, "shakespeare"]
    assert lines[1].endswith("no")
    assert lines[2].split() == ["355M", "gpt2-medium,", "345M", "354.8M", "1.42", "GB", "no"]
    assert call("models", "pull", "gpt2").out == f"{folder}\n"
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert call("models").out.splitlines()[1].endswith(f"  {n_bytes / 1e3:.1f} kB (hub)")
    assert max(map(len, lines[:-1])) <= 80


def test_the_table_as_json(call, server, folder):
    def record() -> dict[str, Any]:
        content = json.loads(call("models", "--json").out)
        assert content["folder"] == str(gpt_xp_home())
        return content | {each["name"]: each for each in content["models"]}

    assert record()["default"] == "shakespeare"
    assert record()["124M"]["copies"] == []
    assert record()["1558M"]["n_params"] == 1_557_611_200
    call("models", "pull", "124M")
    assert record()["default"] == "124M"
    [copy] = record()["124M"]["copies"]
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert copy == {"source": "hub", "folder": str(folder), "n_bytes": n_bytes}


def test_pull_says_where_it_goes_and_prints_the_folder_alone(call, server, folder):
    result = call("models", "pull", "124M")
    assert (result.code, result.out) == (0, f"{folder}\n")
    assert result.err.startswith(f"gpt-xp: fetching 124M from 127.0.0.1 into {folder}\n")
    assert call("models", "pull", "124M") == (0, f"{folder}\n", "")


def test_path(call, server, folder, tmp_path):
    missing = call("models", "path", "124M")
    assert (missing.code, missing.out) == (1, "")
    assert missing.err == "gpt-xp: error: 124M is not here: `gpt-xp models pull 124M` fetches it\n"
    assert not server.requests
    call("models", "pull", "124M")
    assert call("models", "path", "117M") == (0, f"{folder}\n", "")
    assert call("models", "path", "shakespeare").out.endswith("models/shakespeare\n")


def test_rm(call, server, folder):
    missing = call("models", "rm", "124M")
    assert (missing.code, missing.out) == (1, "")
    assert "has nothing of 124M" in missing.err
    call("models", "pull", "124M")
    assert call("models", "rm", "gpt2") == (0, "", f"gpt-xp: removed {folder}\n")
    assert not folder.exists()
    assert call("models", "path", "124M").code == 1


def test_verify(call, server, folder):
    nothing = call("models", "verify")
    assert (nothing.code, nothing.out) == (0, "")
    assert "nothing to verify" in nothing.err
    assert call("models", "verify", "124M").code == 1
    call("models", "pull", "124M")
    whole = call("models", "verify", "124M")
    assert (whole.code, whole.err) == (0, "")
    assert whole.out.splitlines() == [f"ok       {folder / name}" for name in small_published.hub_files()]
    with (folder / "merges.txt").open("a") as file:
        file.write("x")
    damaged = call("models", "verify")
    assert damaged.code == 1
    assert f"DAMAGED  {folder / 'merges.txt'}\n" in damaged.out
    assert damaged.out.count("ok ") == 3
    assert "is not whole: the next use of the model fetches what is missing" in damaged.err
    assert call("models", "pull", "124M").code == 0
    assert call("models", "verify").code == 0


def test_verify_says_what_is_not_whole(call, server, folder):
    call("models", "pull", "124M")
    (folder / WEIGHTS).unlink()
    result = call("models", "verify", "124M")
    assert result.code == 1
    assert f"{folder} is not whole" in result.err
    (folder / "gpt-xp.json").unlink()
    result = call("models", "verify", "124M")
    assert (result.code, result.out) == (1, "")
    assert f"{folder} is not whole" in result.err


def test_what_comes_with_gpt_xp(call):
    for verb in ("pull", "rm", "verify"):
        result = call("models", verb, "shakespeare")
        assert result.code == 1
        assert "comes with gpt-xp" in result.err


def test_an_empty_name_is_no_name(call, server):
    assert "there is no directory ''" in call("-m", "", "x").err
    assert call("--models_dir", "", "x").code == 2


@posix
def test_a_reader_that_goes_away_does_not_end_a_download(server, folder):
    server.cdn.rate = 200_000
    running = start("models", "pull", "124M", command=GPT_XP)
    assert running.stderr is not None
    running.stderr.close()
    assert running.wait(timeout=PATIENCE) == 0
    assert (folder / WEIGHTS).exists()
    running.communicate()


def test_a_wrong_name(call, server):
    for verb in ("pull", "rm", "verify"):
        result = call("models", verb, "gpt2-lage")
        assert (result.code, result.out) == (1, "")
        assert "is no published model; they are: gpt2-large, " in result.err
    assert call("models", "pull").code == 2
    assert call("models", "pull", "124M", "--source", "web").code == 2
    assert call("models", "fetch").code == 2


def test_a_model_by_its_name(call, server):
    result = call("-m", "124M", "--ignore-eos", "-n", "5", "--stats", "the")
    assert result.code == 0
    assert len(result.out) > 1
    assert "124M on numpy" in result.err
    again = call("-m", "gpt2", "--ignore-eos", "-n", "5", "the")
    assert (again.out, again.err) == (result.out, "")
    assert call("the", "-n", "5", "--ignore-eos").out == result.out  # it is the default now
    assert call("tokens", "the").out == call("tokens", "-m", "124M", "the").out


def test_a_wrong_backend_is_said_before_anything_is_fetched(call, server):
    assert "there is no backend" in call("-m", "124M", "-b", "nump", "x").err
    assert not server.requests


def test_offline(call, server):
    for result in (
        call("-m", "124M", "--offline", "x"),
        call("tokens", "-m", "124M", "--offline", "x"),
        call("-m", "124M", "x", GPT_XP_OFFLINE="1"),
        call("models", "pull", "124M", HF_HUB_OFFLINE="1"),
    ):
        assert (result.code, result.out) == (1, "")
        assert "offline" in result.err
        assert result.err.count("\n") == 1
    assert not server.requests
    call("models", "pull", "124M")
    assert call("-m", "124M", "--offline", "the", "-n", "1").code == 0


# --- what is seen of a download ---------------------------------------------------------------------------------------


def test_off_a_terminal_a_line_every_ten_percent(server):
    server.cdn.rate = 200_000
    err = finished(start("models", "pull", "124M", command=GPT_XP)).err
    lines = [line for line in err.splitlines() if f"124M {WEIGHTS}: " in line]
    percents = [int(line.split(": ")[2].split("%")[0]) for line in lines]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    assert 3 <= len(percents) <= 10
    assert all("kB/s" in line and "s left" in line for line in lines)


@posix
def test_on_a_terminal_a_bar_with_size_speed_and_time_left(server, folder):
    server.cdn.rate = 200_000
    terminal = Terminal("models", "pull", "124M", command=GPT_XP)
    assert terminal.end() == 0
    size = len(server.files[path_of(WEIGHTS)]) / 1e3
    assert f"124M {WEIGHTS}: 100%" in terminal.seen
    assert f"{size:.1f}k/{size:.1f}k" in terminal.seen
    assert "B/s" in terminal.seen
    assert terminal.seen.endswith(f"{folder}\n")


@posix
def test_a_retry_is_told_above_the_bar(server):
    server.cdn.faults[path_of(WEIGHTS)] = [reset(20011)]
    server.faults[path_of("config.json")] = [status(503)]
    terminal = Terminal("models", "pull", "124M", command=GPT_XP)
    assert terminal.end() == 0
    assert (
        "gpt-xp: 124M config.json: the server answered 503 Service Unavailable; trying again in 0.01 s" in terminal.seen
    )
    assert f"gpt-xp: 124M {WEIGHTS}: the connection broke" in terminal.seen


# --- when it ends early -----------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_what_has_come_is_kept_and_the_next_time_goes_on(server, folder, how):
    server.cdn.rate = 30_000
    running = start("-m", "124M", "the", command=GPT_XP)
    part = folder / f"{WEIGHTS}.original.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 10_000)
    running.send_signal(signal.Signals[how])
    result = finished(running)
    assert result.code == (130 if how == "SIGINT" else -signal.SIGKILL)
    assert result.out == ""
    assert "Traceback" not in result.err
    if how == "SIGINT":
        assert "what has come is kept" in result.err
    assert not (folder / WEIGHTS).exists()
    kept = part.stat().st_size
    server.cdn.rate = None
    assert finished(start("-m", "124M", "the", "-n", "1", command=GPT_XP)).code == 0
    assert server.cdn.requests[-1].start == kept
    assert server.cdn.requests[-1].sent == len(server.files[path_of(WEIGHTS)]) - kept


def test_two_processes_at_once_fetch_everything_once(server, folder):
    server.cdn.rate = 60_000
    both = [start("models", "pull", "124M", command=GPT_XP) for _ in range(2)]
    results = [finished(each) for each in both]
    assert [result[:2] for result in results] == [(0, f"{folder}\n")] * 2
    assert any("another process is working on" in result.err for result in results)
    assert server.cdn.sent(path_of(WEIGHTS)) == len(server.files[path_of(WEIGHTS)])
    assert sum(request.path == path_of("config.json") for request in server.requests) == 1


@posix
def test_ctrl_c_while_waiting_for_another_process(server, folder):
    from filelock import FileLock

    folder.mkdir(parents=True)
    with FileLock(folder.with_name("hub.lock")):
        terminal = Terminal("models", "pull", "124M", command=GPT_XP)
        terminal.read(until="another process")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


@posix
def test_a_full_disk(server, folder):
    """The kernel refuses to let a file grow: so real a failure that no part of Python can be wrong about it."""
    limited = small_published.command(
        "124M",
        before="import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))",
    )
    result = finished(start("-m", "124M", "the", command=limited))
    assert (result.code, result.out) == (1, "")
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "free some space; what has come is kept" in errors[0]
    assert "Traceback" not in result.err
    assert not (folder / WEIGHTS).exists()
    again = finished(start("-m", "124M", "the", "-n", "1", command=GPT_XP))
    assert again.code == 0
    assert server.cdn.requests[-1].start == 30_000


def mounted_small(place: Path, n_bytes: int) -> bool:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@posix
def test_a_disk_of_its_own_that_is_too_small(server, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    if not mounted_small(disk, 64 * 1024):
        pytest.skip("mounting a tmpfs needs root")
    try:
        monkeypatch.setenv("GPT_XP_HOME", str(disk))
        result = finished(start("-m", "124M", "the", command=GPT_XP))
        assert result.code == 1
        assert "of disk space, and" in result.err
        assert not list(disk.rglob(f"{WEIGHTS}*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_network_is_one_line_and_exit_code_1(server, tmp_path):
    for endpoint in ("http://127.0.0.1:9", "http://nonexistent.invalid"):
        variables = {**os.environ, "HF_ENDPOINT": endpoint}
        result = process("-m", "124M", "the", command=GPT_XP, env=variables)
        assert (result.code, result.out) == (1, "")
        assert sum("error:" in line for line in result.err.splitlines()) == 1
        assert "Traceback" not in result.err


@posix
def test_no_secret_is_printed(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.cdn.always[path_of(WEIGHTS)] = status(403)
    result = finished(start("-m", "124M", "the", command=GPT_XP))
    assert result.code == 1
    assert "403" in result.err
    assert server.sees("hf_secret")
    for secret in ("hf_secret", "Signature", *server.cdn.signatures):
        assert secret not in result.err


@pytest.mark.parametrize("name", ["../../x", "124M/../../x", "..", "/"])
def test_a_name_writes_nothing_outside_the_cache(call, server, name, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for verb in ("pull", "rm", "verify"):
        assert call("models", verb, name).code == 1
    assert sorted(tmp_path.rglob("*")) == before
