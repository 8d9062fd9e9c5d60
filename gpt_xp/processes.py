"""What `compare` and `bench` share: the processes that do their work, each with one library in it."""

import os
import subprocess
import sys

from gpt_xp import json_text

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "NUMBA_NUM_THREADS")


def own_command(*arguments: str) -> list[str]:
    """Return the command that runs gpt-xp, in the Python that runs this."""
    return [sys.executable, "-m", "gpt_xp", *arguments]


def thread_variables(threads: int | None) -> dict[str, str]:
    """Return what libraries read before they start, to compute in so many threads; nothing for None."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}


def reason(stderr: str, code: int | None) -> str:
    """Return in one line why a process ended: the last that it wrote to stderr, or its exit code."""
    lines = stderr.strip().splitlines()
    return lines[-1].removeprefix("gpt-xp: error: ") if lines else f"it ended with {code}"


def usable_backends() -> list[str]:
    """The backends that can be used here. Asked in another process: JAX takes most of a GPU when it looks for one."""
    command = own_command("backends", "--json")
    variables = {name: value for name, value in os.environ.items() if name != "GPT_XP_VERBOSE"}  # it takes seconds
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True, env=variables)
    return [info["name"] for info in json_text.parse(done.stdout)["backends"] if info["problem"] is None]
