"""Handle Ctrl-C and SIGTERM where Python's default is not enough: in JAX's imports and callbacks, and with children."""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once with code 130 while the body runs. Use it where nothing can be lost.

    A KeyboardInterrupt while NumPy or JAX is imported would be swallowed there, or crash the process.
    """
    changed = let_interrupt_exit()
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def let_interrupt_exit() -> bool:
    """Let Ctrl-C end the process at once from now on.

    Return False, and change nothing, where Ctrl-C is ignored (as with nohup) or has another handler.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, exit_now)
    return True


@contextlib.contextmanager
def clean_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM leave the body by an exception, which removes its processes and files, and then end the process.

    Change nothing where the signal has another handler already, or outside the main thread.
    """
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []

    def leave(signum: int, frame: object) -> None:
        came.append(signum)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def ignore_interrupt() -> Iterator[None]:
    """Ignore Ctrl-C while the body runs. Use it for short work that must not end in the middle."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def resend_interrupt(lost: "sys.UnraisableHookArgs") -> None:
    """Send a Ctrl-C again that was lost because it came while a callback ran.

    Python drops such an interrupt, and JAX has a callback in garbage collection.
    """
    if lost.exc_type is KeyboardInterrupt:
        again = threading.Timer(0.01, _thread.interrupt_main)  # It is sent a little later, when the callback is over.
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def exit_now(signum: int, frame: object) -> None:
    """End the process at once, without any cleanup. This is a signal handler for Ctrl-C."""
    os.write(2, b"\n")  # The terminal has written ^C.
    os._exit(130)
