"""Run a command in several processes that share a mesh: process 0 prints, and all end where one has died.

All processes run the same command. Where one dies, JAX ends the others: their next sum fails, or JAX's own heartbeat
aborts them with a stack trace. So a filter reads what JAX and its libraries write, and shows one line instead.
"""

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import click

from gpt_xp.cli import output
from gpt_xp.cli.wording import is_from_variable
from gpt_xp.mesh import launched_processes, parse_hosts
from gpt_xp.registry import default_backend

DIED = "gpt-xp: error: another process of this mesh has died or cannot be reached: see what it wrote, and start again"
# It drops messages about JAX's coordination. It writes one error: that of the command, or that JAX aborts the process.
FILTER = """
import re, sys
drops = ends = False
for line in sys.stdin.buffer:
    error = line.startswith(b"gpt-xp: error: ")
    if begins := error or re.match(rb"[IWEF]\\d{4} ", line):
        drops = re.search(b"coordination|preemption|distributed service|add_port.cc", line) and not error
    if drops and begins and line.startswith(b"F"):
        error, line = True, sys.argv[1].encode() + b"\\n"
    if not ends and (error or not drops):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    ends = ends or error
"""
_state = SimpleNamespace(are_running=False)


def begin(ctx: click.Context, loading: dict[str, Any]) -> None:
    """Prepare a command whose options `mesh` and `hosts` may name several processes; call it before anything else.

    Options that variables set are removed from `loading` where they do not apply: `mesh` without jax, and `hosts`
    without a mesh.
    """
    leave_mesh_aside(ctx, loading)
    if loading["mesh"] is None and is_from_variable(ctx, "hosts"):
        loading["hosts"] = None
    mesh, hosts = loading["mesh"], loading["hosts"]
    count, index = launched_processes()
    if hosts is not None:
        named = parse_hosts(hosts)
        count, index = named.count, named.index
    if mesh is None or count < 2:
        return
    _state.are_running = True
    _filter_output_of_libraries()
    if index:
        output.state.is_silent = True


def leave_mesh_aside(ctx: click.Context, loading: dict[str, Any]) -> None:
    """Remove a mesh that a variable sets where the backend is not jax."""
    if (loading.get("backend", "jax") or default_backend()) != "jax" and is_from_variable(ctx, "mesh"):
        loading["mesh"] = None


def are_running() -> bool:
    """Return whether this is one of several processes."""
    return bool(_state.are_running)


def refuse_stdin() -> None:
    """Raise a usage error in one of several processes, each of which has another stdin."""
    if are_running():
        raise click.UsageError("stdin cannot be read by several processes: name a file that all of them can read")


def show_error(text: str) -> None:
    """Write the error that ends the command as one line to stderr. JAX may abort the process at the same time."""
    line = f"gpt-xp: error: {text}"
    if are_running():
        os.write(2, f"{line}\n".encode(errors="replace"))
    else:
        click.echo(line, err=True)


def end_at_once(code: int) -> None:
    """End one of several processes that ends before the others have done their work. JAX would wait for them."""
    if are_running() and (code or output.state.reader_is_gone):
        os._exit(code)


def _filter_output_of_libraries() -> None:
    """Give file descriptor 2 to a filter, and 1 to nothing; Python's own streams keep the terminal or the pipe."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            own = io.FileIO(os.dup(stream.fileno()), "w")
            buffered = io.BufferedWriter(own)
            setattr(sys, name, io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True))
    # It has a session of its own, so that Ctrl-C does not end it before this process.
    command = [sys.executable, "-I", "-c", FILTER, DIED]
    filter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert filter.stdin is not None
    os.dup2(filter.stdin.fileno(), 2)
    filter.stdin.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo writes there for each connection.
