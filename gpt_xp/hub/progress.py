"""Show the progress of a download on stderr: a bar on a terminal, elsewhere a line every ten percent."""

import contextlib
import sys
import time
from typing import Any, Protocol

from gpt_xp.reporting.text import size


class DownloadProgress(Protocol):
    """Receives the progress of a download."""

    def start(self, label: str, n_bytes: int | None, done: int) -> None:
        """Report the start or restart of a file of `n_bytes`, of which `done` are already here."""

    def advance(self, n_bytes: int) -> None:
        """Report that `n_bytes` more have arrived."""

    def note(self, text: str) -> None:
        """Report a message of one line."""

    def end(self) -> None:
        """Report that the download of the file ends, complete or not."""


class StderrProgress:
    """Shows the progress of a download on stderr. Lines of `note` begin with "gpt-xp:", as all lines there do."""

    def __init__(self) -> None:
        self._bar: _Bar | _Lines | None = None

    def start(self, label: str, n_bytes: int | None, done: int) -> None:
        """Show a file, of which `done` bytes are here. Without stderr nothing is shown."""
        with _ignoring_errors_of_stderr():
            if self._bar is not None:
                self._bar.go_to(done)
            elif sys.stderr is not None:
                self._bar = _Bar(label, n_bytes, done) if sys.stderr.isatty() else _Lines(label, n_bytes, done)

    def advance(self, n_bytes: int) -> None:
        """Show that `n_bytes` more have arrived."""
        if self._bar is not None:
            with _ignoring_errors_of_stderr():
                self._bar.advance(n_bytes)

    def note(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        if sys.stderr is not None:
            from tqdm import tqdm

            with _ignoring_errors_of_stderr():
                tqdm.write(f"gpt-xp: {text}", file=sys.stderr)
                sys.stderr.flush()

    def end(self) -> None:
        """Close the bar, and leave it on the screen."""
        if self._bar is not None:
            with _ignoring_errors_of_stderr():
                self._bar.close()
        self._bar = None


def _ignoring_errors_of_stderr() -> contextlib.AbstractContextManager[None]:
    """Ignore that a bar cannot be drawn. The reader of a pipe may be gone, or a disk full."""
    return contextlib.suppress(OSError)


class _Bar:
    """Draws the bar of a file."""

    def __init__(self, label: str, n_bytes: int | None, done: int) -> None:
        from tqdm import tqdm

        self._tqdm: Any = tqdm(
            desc=label, total=n_bytes, initial=done, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True
        )

    def go_to(self, done: int) -> None:
        self._tqdm.n = done
        self._tqdm.refresh()

    def advance(self, n_bytes: int) -> None:
        self._tqdm.update(n_bytes)

    def close(self) -> None:
        self._tqdm.close()


class _Lines:
    """Writes a line for each tenth; for a file of unknown size, one at the end."""

    def __init__(self, label: str, n_bytes: int | None, done: int) -> None:
        self.label, self.n_bytes = label, n_bytes
        self.go_to(done)

    def go_to(self, done: int) -> None:
        self.done = self.begun_at = done
        self.begun = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        before, self.done = self.done, self.done + n_bytes
        if self.n_bytes and self.done * 10 // self.n_bytes > before * 10 // self.n_bytes:
            self._line(f"{self.done * 100 // self.n_bytes}% of {size(self.n_bytes)}")

    def close(self) -> None:
        if not self.n_bytes and self.done:
            self._line(size(self.done))

    def _line(self, how_much: str) -> None:
        speed = (self.done - self.begun_at) / max(time.monotonic() - self.begun, 1e-3)
        left = f", {((self.n_bytes or self.done) - self.done) / speed:.0f} s left" if speed else ""
        print(f"gpt-xp: {self.label}: {how_much}, {size(speed)}/s{left}", file=sys.stderr, flush=True)
