"""What a person sees of a download, on stderr: a bar on a terminal, elsewhere a line every ten percent."""

import contextlib
import sys
import time
from typing import Any

from gpt_xp.reporting.text import size


class StderrProgress:
    """The `download.Progress` for people; the line that `note` writes begins with "gpt-xp:", as all of ours do."""

    def __init__(self) -> None:
        self._bar: _Bar | _Lines | None = None

    def start(self, label: str, n_bytes: int | None, done: int) -> None:
        """Show a file, or one that goes on at `done`; nothing where there is no stderr."""
        with _whatever_becomes_of_stderr():
            if self._bar is not None:
                self._bar.go_to(done)
            elif sys.stderr is not None:
                self._bar = _Bar(label, n_bytes, done) if sys.stderr.isatty() else _Lines(label, n_bytes, done)

    def advance(self, n_bytes: int) -> None:
        """Show that so many bytes have come."""
        if self._bar is not None:
            with _whatever_becomes_of_stderr():
                self._bar.advance(n_bytes)

    def note(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        if sys.stderr is not None:
            from tqdm import tqdm

            with _whatever_becomes_of_stderr():
                tqdm.write(f"gpt-xp: {text}", file=sys.stderr)
                sys.stderr.flush()

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            with _whatever_becomes_of_stderr():
                self._bar.close()
        self._bar = None


def _whatever_becomes_of_stderr() -> contextlib.AbstractContextManager[None]:
    """No download ends because a bar cannot be drawn: the reader of a pipe may have gone, or a disk be full."""
    return contextlib.suppress(OSError)


class _Bar:
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
    """A line for each tenth; one at the end for a file whose size is not known."""

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
