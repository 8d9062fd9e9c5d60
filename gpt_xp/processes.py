"""Helpers for the processes that `compare`, `bench` and `bulk` start."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from gpt_xp import json_text
from gpt_xp.errors import BackendError, GptXpError, SettingError
from gpt_xp.memory import ITEM_SIZE

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "NUMBA_NUM_THREADS")

StageProgress = Callable[[str], contextlib.AbstractContextManager[Any]]  # name of a stage -> context of that stage


def no_stage_progress(stage: str) -> contextlib.AbstractContextManager[None]:
    """Return a context that shows nothing."""
    return contextlib.nullcontext()


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise `SettingError` for a dtype that no backend computes in."""
    for dtype in dtypes:
        if dtype not in ITEM_SIZE:
            raise SettingError(f"there is no dtype {dtype!r}; there are: {', '.join(ITEM_SIZE)}")


def own_command(*arguments: str) -> list[str]:
    """Return the command that runs gpt-xp in this Python. It imports nothing from the current directory."""
    return [sys.executable, "-P", "-m", "gpt_xp", *arguments]


# With it, JAX leaves memory of a GPU to other processes. Otherwise it takes most of it when it starts.
JAX_VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def thread_variables(threads: int | None) -> dict[str, str]:
    """Return the environment variables that set the number of threads of libraries; an empty dict for None."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}


def failure_reason(stderr: str, code: int | None) -> str:
    """Return the reason why a process failed, in one line: the last line of its stderr, or its exit code."""
    lines = stderr.strip().splitlines()
    return lines[-1].removeprefix("gpt-xp: error: ") if lines else f"it ended with {code}"


def usable_backends() -> list[str]:
    """Return the names of the backends that can be used here.

    Another process looks for them, because JAX reserves most of a GPU's memory when it looks for a GPU. Raises
    `BackendError` if that process fails.
    """
    command = own_command("backends", "--json")
    # With --verbose, the command would measure for seconds.
    variables = {name: value for name, value in os.environ.items() if name != "GPT_XP_VERBOSE"}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, env=variables)
    if done.returncode:
        raise BackendError(f"the installed backends cannot be listed: {failure_reason(done.stderr, done.returncode)}")
    return [info["name"] for info in json_text.parse(done.stdout)["backends"] if info["problem"] is None]


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, with the name of its class unless it is one of gpt-xp's errors."""
    text = " ".join(str(error).split())
    return text if isinstance(error, GptXpError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def take_streams() -> tuple[TextIO, TextIO]:
    """Return stdin and stdout under new numbers. Then stdin is empty, and stdout goes to stderr."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers
