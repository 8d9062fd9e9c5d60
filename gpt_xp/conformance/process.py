"""Starts the process in which a library is checked, and ends it when a check takes too long."""

import contextlib
import json
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_xp import json_text
from gpt_xp.errors import JsonError
from gpt_xp.processes import own_command


class CheckEnded(Exception):  # noqa: N818, it is no error of gpt-xp
    """The error of a check that could not be made: it took too long, its process crashed, or it raised an error."""

    def __init__(self, problem: str, hung: bool = False) -> None:
        super().__init__(problem)
        self.hung = hung


class LibraryProcess:
    """The process of a library. After a crash or a check that hung, the next check gets a new process."""

    def __init__(self, module: str, folder: Path, jit: str | None, timeout: float) -> None:
        self._first: dict[str, Any] = {"module": module, "folder": str(folder), "jit": jit, "replaced": []}
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr: Any = None

    def start(self) -> dict[str, Any]:
        """Start the process, and return the description of the library. Raises `CheckEnded`, and ends it then."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, `end` closes it
        self._process = subprocess.Popen(
            own_command("conform-worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        try:
            described: dict[str, Any] = self._ask(self._first)
        except CheckEnded:
            self.end()  # Without a library, the process would fail at each later check too, for another reason.
            raise
        return described

    def check(self, do: str, **arguments: Any) -> Any:
        """Make a check, and return its value. Raises `CheckEnded`."""
        if self._process is None:
            self.start()
        return self._ask({"do": do, "with": arguments})

    def replace(self, names: Sequence[str]) -> None:
        """Let NumPy compute these functions in the checks that follow, which get a new process."""
        self.end()
        self._first["replaced"] = list(names)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # If the process has ended, there is no answer, which is told below.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self.end()
            raise CheckEnded(f"it took longer than {self._timeout:g} s, and its process was ended", hung=True) from None
        if answer is None:
            raise CheckEnded(self._last_words())
        if "problem" in answer:
            raise CheckEnded(answer["problem"])
        return answer["value"]

    def _last_words(self) -> str:
        """Return how the process ended, and the last line that it wrote to stderr."""
        assert self._process is not None
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.end()
        how = f"crashed: {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}" + (f" ({lines[-1].strip()})" if lines else "")

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._stderr.close()
        self._process = None

    def __enter__(self) -> "LibraryProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def _read(process: "subprocess.Popen[str]", answers: "queue.Queue[dict[str, Any] | None]") -> None:
    """Put each answer of the process into the queue, and None at its end."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            try:
                answers.put(json_text.parse(line))
            except JsonError:  # A crash can leave half a line.
                continue
    answers.put(None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
