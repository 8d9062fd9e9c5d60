"""Runs the command in new processes, to test terminals, pipes, signals and exit codes."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PATIENCE = 600  # seconds until a process counts as hung; a busy machine needs much less
COMMAND = [sys.executable, "-m", "gpt_xp"]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, pipes and terminals")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def process(*args: str, command: list[str] = COMMAND, **settings: object) -> Result:
    """Run the command in a new process."""
    settings = {"stdin": subprocess.DEVNULL, **settings}
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=PATIENCE, check=False, **settings)
    return Result(done.returncode, done.stdout, done.stderr)


def start(*args: str, command: list[str] = COMMAND, **streams: object) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([*command, *args], **streams)


class Terminal:
    """A process whose streams are a terminal; `stdout` may be another file."""

    def __init__(self, *args: str, command: list[str] = COMMAND, stdout: object = None) -> None:
        import pty
        import termios

        self.mine, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self.process = subprocess.Popen(
            [*command, *args], stdin=theirs, stdout=stdout or theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def read(self, until: str | None = None) -> str:
        """Wait until the output contains `until`, or the process has ended; return all output so far."""
        while until is None or until not in self.seen:
            if not select.select([self.mine], [], [], PATIENCE)[0]:
                self.process.kill()
                pytest.fail(f"no more output, after {self.seen!r}")
            try:
                data = os.read(self.mine, 4096)
            except OSError:  # On Linux, this means that the other end is closed.
                break
            if not data:
                break
            self.seen += data.decode().replace("\r\n", "\n")
        return self.seen

    def end(self) -> int:
        self.read()
        os.close(self.mine)
        return self.process.wait(timeout=PATIENCE)


KILLED = """
import os, signal, sys
from gpt_xp.cli import main
from gpt_xp.cli.train import TrainingBar
from gpt_xp.hub.find import find_model

kind, name, count = sys.argv.pop(1).split(":")
seen = 0

def happens(event, of):
    global seen
    seen += event == kind and os.path.basename(str(of)).startswith(name)
    if seen == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

def stepped(self, step, loss, tokens):
    happens("step", step)

sys.addaudithook(lambda event, args: event in ("open", "os.rename") and happens(event, args[event == "os.rename"]))
TrainingBar.stepped = stepped
main()
"""


def in_a_new_process(code: str, **environment: str) -> Any:
    """Run Python code that prints JSON, and return it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started; none where there is no /proc."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
