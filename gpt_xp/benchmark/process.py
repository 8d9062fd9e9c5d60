"""Start the process of a contender, talk to it through pipes, and end it."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from gpt_xp import json_text
from gpt_xp.errors import JsonError
from gpt_xp.processes import failure_reason

PATIENCE = 5  # seconds for a process to end by itself


class ContenderError(Exception):
    """A contender has answered with an error, or its process has ended. The message says why in one line."""


class ContenderProcess:
    """A running process that speaks the protocol of `worker.py`. Use it as a context, which ends the process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        # A file, because a pipe that is read only at the end would fill and block the process.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, __exit__ closes it
        self._process: subprocess.Popen[str] | None = None
        self._problem = ""
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                encoding="utf-8", errors="replace", env=os.environ | environment,
            )  # fmt: skip
        except OSError as error:  # The program does not exist, or cannot be run.
            self._problem = f"{command[0]} cannot be run: {error.strerror}"

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Send a request and return its answer. Raises `ContenderError`."""
        self.send(do, **details)
        return self.receive()

    def send(self, do: str, **details: Any) -> None:
        """Send a request. Where the process has ended, `receive` says so."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
                self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the answer to the last request. Raises `ContenderError`."""
        if self._process is None:
            raise ContenderError(self._problem)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = _answer(line)
            if answer is None:
                continue  # The script has written something else before it began to serve.
            if "error" in answer:
                raise ContenderError(answer["error"])
            return answer
        code = self._process.wait()
        self._stderr.seek(0)
        raise ContenderError(failure_reason(self._stderr.read().decode(errors="replace"), code))

    def __enter__(self) -> "ContenderProcess":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            if error[0] is None and self._process.poll() is None:
                self.send("quit")
            else:
                self._process.kill()
            _end(self._process)
        self._stderr.close()


def _answer(line: str) -> dict[str, Any] | None:
    try:
        answer = json_text.parse(line)
    except JsonError:
        return None
    return answer if isinstance(answer, dict) else None


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):  # The process may have ended before it read everything.
            stream.close()
