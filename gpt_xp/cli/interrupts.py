"""Ctrl-C, where Python's own way does not do: importing JAX, and callbacks."""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with 130, while the body runs: where there is nothing yet to keep.

    A KeyboardInterrupt that is raised while NumPy or JAX is imported is swallowed there, or crashes the process.
    """
    changed = let_interrupt_exit()
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def let_interrupt_exit() -> bool:
    """Let Ctrl-C end the process at once from now on; return False where it is ignored, as behind nohup, or set."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, exit_now)
    return True


@contextlib.contextmanager
def ignore_interrupt() -> Iterator[None]:
    """Let Ctrl-C do nothing while the body runs, which must be short: where half of it would be worse than all."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def resend_interrupt(lost: "sys.UnraisableHookArgs") -> None:
    """Send a Ctrl-C again that came while a callback ran: Python drops those, and JAX has one in garbage collection."""
    if lost.exc_type is KeyboardInterrupt:
        again = threading.Timer(0.01, _thread.interrupt_main)  # a little later, when the callback is over
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def exit_now(signum: int, frame: object) -> None:
    """End the process, as a handler of Ctrl-C: nothing is unwound, nothing cleaned up."""
    os.write(2, b"\n")  # the terminal has written ^C
    os._exit(130)
