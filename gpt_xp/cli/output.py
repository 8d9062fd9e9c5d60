"""Write results to stdout, and everything else to stderr."""

import contextlib
import errno
import io
import itertools
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from gpt_xp.cli.interrupts import exit_on_interrupt
from gpt_xp.errors import GptXpWarning

if TYPE_CHECKING:
    from tqdm import tqdm

SCHEMA = 2  # the version of the JSON that --json prints; a change that can break a reader adds one
state = SimpleNamespace(
    is_silent=False,  # Another process prints the same, so this one writes nothing but errors.
    reader_is_gone=False,  # The reader of a pipe has gone, and the rest is not wanted.
)


def write(text: str) -> None:
    """Write to stdout at once. Where the reader of a pipe has gone, the command ends without a message."""
    if state.is_silent:
        return
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _end(error)


def write_json(record: dict[str, Any]) -> None:
    """Write one line of JSON in ASCII, which no terminal, pipe or code page can damage."""
    write(json.dumps({"schema": SCHEMA, **record}) + "\n")


def write_json_list(record: dict[str, Any], name: str, items: Iterable[str]) -> None:
    """Write one line of JSON as `write_json` does, with a list `name` of items that need not fit into memory.

    Each item is JSON text.
    """
    write(json.dumps({"schema": SCHEMA, **record, name: []}).removesuffix("]}"))
    write_many(f", {item}" if index else item for index, item in enumerate(items))
    write("]}\n")


def write_many(texts: Iterable[str]) -> None:
    """Write many short texts, a thousand at a time."""
    each = iter(texts)
    while some := "".join(itertools.islice(each, 1000)):
        write(some)


def note(text: str) -> None:
    """Write one line to stderr."""
    show(f"gpt-xp: {text}")


def show(text: str) -> None:
    """Write text and a newline to stderr."""
    if not state.is_silent:
        click.echo(text, err=True)


@contextlib.contextmanager
def notes_of_warnings() -> Iterator[None]:
    """Write each `GptXpWarning` of the body as one line to stderr, even where warnings are errors."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_or_note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, GptXpWarning):
                note(str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_or_note
        warnings.simplefilter("always", GptXpWarning)
        yield


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal that shows something; a closed stream is None."""
    return stream is not None and not state.is_silent and stream.isatty()


def progress_bar(total: int | None, unit: str) -> "tqdm[NoReturn]":
    """Return a progress bar on stderr. It is shown only on a terminal, and only after one second."""
    from tqdm import tqdm

    hidden = not is_terminal(sys.stderr)
    return tqdm(total=total, unit=unit, unit_scale=unit == "B", delay=1, disable=hidden, leave=False)


@contextlib.contextmanager
def waiting(what: str, delay: float = 1, exit_at_once: bool = True) -> Iterator[None]:
    """Show `what` on a terminal after `delay` seconds of the body, in which Ctrl-C ends the process at once.

    Without `exit_at_once`, Ctrl-C interrupts the body, which can clean up.
    """
    done = threading.Event()

    def show() -> None:
        if not done.wait(delay):
            from tqdm import tqdm

            with tqdm(desc=what, bar_format="{desc} {elapsed}", leave=False) as bar:
                while not done.wait(0.5):
                    bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    if is_terminal(sys.stderr):
        thread.start()
    try:
        with exit_on_interrupt() if exit_at_once else contextlib.nullcontext():
            yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def make_encodable() -> None:
    """Let stdout show "?" for a character that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def discard_stdout() -> None:
    """Discard unwritten output. Otherwise Python would complain about it when it exits."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def settle_stderr() -> None:
    """Discard unwritten errors where stderr is closed. Otherwise Python would exit with code 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _end(error: OSError) -> NoReturn:
    discard_stdout()
    # Windows reports EINVAL when the other end of a pipe is closed.
    if error.errno == errno.EPIPE or (sys.platform == "win32" and error.errno == errno.EINVAL):
        state.reader_is_gone = True
        raise click.exceptions.Exit(0) from None
    raise click.ClickException(f"cannot write to stdout: {error.strerror}") from None
