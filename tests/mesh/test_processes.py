"""Two processes that share a mesh of four devices: text, scores, training, and the death of one of them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Result, posix
from small_trainings import EVERYTHING, log, story

import gpt_xp
from gpt_xp import Model

pytestmark = [posix, pytest.mark.usefixtures("on_mesh")]
COMMAND = [sys.executable, str(Path(__file__).parent.parent / "support" / "on_loopback.py")]
BUNDLED = ("-m", "shakespeare", "--backend", "jax", "--mesh", "data=2,model=2")
FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
STREAMS: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
LINE = r"gpt-xp: error: another .* died or cannot be reached.*\n"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(*args: str, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the command in two processes of two devices each; end those that are left.

    The variables may hold {index} and {port}. Without variables, the processes are joined by --hosts.
    """
    processes = []
    port = free_port()
    for index in range(2):
        own = {name: value.format(index=index, port=port) for name, value in variables.items()}
        hosts = [] if variables else ["--hosts", f"127.0.0.1:{port},2,{index}"]
        processes.append(
            subprocess.Popen([*COMMAND, *args, *hosts], **STREAMS, text=True, env=os.environ | FLAGS | own)
        )
    try:
        yield processes
    finally:
        for each in processes:
            each.kill()
            each.communicate()


def both(*args: str, **variables: str) -> list[Result]:
    with started(*args, **variables) as processes:
        return [Result(*_ended(each)) for each in processes]


def _ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_text_is_that_of_one_process_and_only_process_0_prints(shakespeare: Model) -> None:
    first, second = both(*BUNDLED, "--temperature", "0.8", "-n", "30", "--seed", "11", "--json", "ROMEO:")
    expected = shakespeare.generate("ROMEO:", max_tokens=30, temperature=0.8, seed=11)
    record = json.loads(first.out)
    assert (record["text"], record["device"]) == (expected.text, "mesh data=2 model=2 of cpu")
    assert first[::2] == (0, "")
    assert second == (0, "", "")


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "{index}",
    "SLURM_LOCALID": "{index}",
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}",
    "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:{port}",  # The test must not listen on other addresses.
}


def test_processes_that_slurm_starts_are_joined(shakespeare: Model) -> None:
    first, second = both(*BUNDLED, "-n", "5", "ROMEO:", **SLURM)
    assert first == (0, shakespeare.generate("ROMEO:", max_tokens=5).text + "\n", "")
    assert second == (0, "", "")


def test_a_drawn_seed_is_that_of_process_0(shakespeare: Model, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ROMEO:\nWhat is\nTo be\n")
    file = str(tmp_path / "prompts.txt")
    first, second = both(*BUNDLED, "--temperature", "0.8", "-n", "20", "--prompt-file", file, "--batch-size", "2")
    assert first.code == second.code == 0
    assert second.out == second.err == ""
    settings, *lines = map(json.loads, first.out.splitlines())
    texts = [line["text"] for line in lines if line["type"] == "result"]
    prompts = ["ROMEO:", "What is", "To be"]
    expected = shakespeare.generate(prompts, max_tokens=20, temperature=0.8, seed=settings["seed"])
    assert texts == [each.text for each in expected]


def test_a_score_is_that_of_one_process(shakespeare: Model, tmp_path: Path) -> None:
    text = "KING HENRY:\nWhat say you to that, my lord?\n" * 30
    (tmp_path / "text.txt").write_text(text)
    first, second = both("score", *BUNDLED, "--json", str(tmp_path / "text.txt"))
    assert second == (0, "", "")
    assert json.loads(first.out)["nats_per_token"] == pytest.approx(shakespeare.score(text).nats_per_token, abs=1e-4)


def test_training_is_that_of_one_process_and_can_go_on(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(story(2000))
    options = EVERYTHING | {"batch_size": 4, "steps": 3, "eval_every": 2}
    gpt_xp.train(tmp_path / "story.txt", tmp_path / "alone", **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = str(tmp_path / "out")
    first, second = both("train", "--data", str(tmp_path / "story.txt"), "--out", out, "--mesh", "auto", *words)
    assert second == (0, "", "")
    assert first.code == 0
    assert "has the model of step 3 of 3" in first.out
    for found, expected in zip(log(tmp_path / "out"), log(tmp_path / "alone"), strict=True):
        assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    weights, expected = (gpt_xp.load(tmp_path / name, backend="numpy").params["wte"] for name in ("out", "alone"))
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    # Both processes read the state that process 0 has written; there is nothing left to do.
    again = both("train", "--out", out, "--resume")  # The mesh is that of the run.
    assert again[0][:2] == (0, first.out)
    assert again[1] == (0, "", "")


def test_stdin_is_refused() -> None:
    for args in (BUNDLED, ("score", *BUNDLED, "-"), (*BUNDLED, "--prompt-file", "-"), (*BUNDLED, "-", "more")):
        for each in both(*args):
            assert each.code == 2
            assert "Error: stdin cannot be read by several processes" in each.err


PYTHON = """
import sys, time
import on_loopback
import gpt_xp
from gpt_xp.errors import BackendError
index, port, case = sys.argv[1:]
backend = gpt_xp.get_backend("jax", mesh="data=2,model=2", hosts=f"127.0.0.1:{port},2,{index}")
if case == "late":
    if index == "0":
        time.sleep(35)  # Gloo's patience is 30 s.
    backend.wait_for_others("here")
    model = gpt_xp.load("shakespeare", backend=backend)
    model.save(sys.argv[0] + "-saved")
    print(gpt_xp.load(sys.argv[0] + "-saved", backend="jax").generate("ROMEO:", max_tokens=5).token_ids)
else:
    model = gpt_xp.load("shakespeare", backend=backend)
    calls = {
        "prompt": lambda own: model.generate(f"ROMEO {own}:", max_tokens=5),
        "settings": lambda own: model.generate("ROMEO:", max_tokens=5 + own),
        "score": lambda own: model.score(f"To be, or not to be {own}"),
        "rank": lambda own: model.rank("To be", [f" {own}", "x"]),
    }
    for name, call in calls.items():
        try:
            call(int(index))
            print("no error for", name)
        except BackendError as error:
            print(error)
"""


def both_in_python(case: str, script: Path) -> list[Result]:
    script.write_text(PYTHON)
    port = str(free_port())
    support = {"PYTHONPATH": str(Path(__file__).parent.parent / "support")}
    environment = os.environ | FLAGS | support
    processes = [
        subprocess.Popen([sys.executable, str(script), str(index), port, case], **STREAMS, text=True, env=environment)
        for index in range(2)
    ]
    return [Result(*_ended(each)) for each in processes]


@pytest.mark.slow
def test_a_process_may_be_late_and_all_see_the_files_of_process_0(shakespeare: Model, tmp_path: Path) -> None:
    """In process 1, plain JAX computes on the devices of that process."""
    expected = shakespeare.generate("ROMEO:", max_tokens=5).token_ids
    for each in both_in_python("late", tmp_path / "script.py"):
        assert each.out.splitlines()[-1] == str(expected), each.err


def test_processes_with_different_work_are_refused(tmp_path: Path) -> None:
    for each in both_in_python("different", tmp_path / "script.py"):
        told = [line for line in each.out.splitlines() if "Gloo" not in line]
        assert len(told) == 4, each
        assert all(
            line.startswith("the 2 processes were given different work: start all of them with") for line in told
        )


def test_a_reader_that_goes_ends_all(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ROMEO:\n" * 200)
    with started(*BUNDLED, "--prompt-file", str(tmp_path / "prompts.txt"), "-n", "20") as processes:
        assert processes[0].stdout is not None
        processes[0].stdout.read(1)
        processes[0].stdout.close()
        assert processes[0].wait(PATIENCE) == 0
        assert processes[1].wait(PATIENCE) != 0
        assert re.fullmatch(LINE, processes[1].communicate()[1])


def listening(pid: int) -> list[str]:
    """Return the addresses that a process listens on, as Linux writes them."""
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(each))
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux shows what a process listens on")
@pytest.mark.parametrize(
    ("victim", "sent"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM), (1, signal.SIGSTOP)],
    ids=["first", "second", "ended", "hung"],
)
def test_when_a_process_dies_the_other_ends_with_one_line(tmp_path: Path, victim: int, sent: int) -> None:
    from gpt_xp_backends.jax_mesh import HEARTBEAT_SECONDS

    (tmp_path / "long.txt").write_text("KING HENRY:\nWhat say you to that, my lord?\n" * 20_000)
    with started("score", *BUNDLED, str(tmp_path / "long.txt")) as processes:
        loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
        until = time.monotonic() + PATIENCE
        while not all(listening(each.pid) for each in processes):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(5)  # Both have joined, and compute.
        for each in processes:
            assert each.poll() is None
            assert set(listening(each.pid)) <= loopback
        processes[victim].send_signal(sent)
        begin = time.monotonic()
        survivor = processes[1 - victim]
        out, err = survivor.communicate(timeout=HEARTBEAT_SECONDS + 10)
        assert time.monotonic() - begin < HEARTBEAT_SECONDS + 10
        assert survivor.returncode != 0
        assert out == ""
        assert re.fullmatch(LINE, err), err
