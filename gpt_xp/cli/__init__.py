"""The command line, thin: parse, call the library, print.

One file for each command. `group.py` finds the command, `options.py` has what several commands share, `prompts.py`
and `prompt_files.py` say where prompts come from, and `output.py` writes: the continuation to stdout, everything else
to stderr.

Nothing is imported here but what Python has loaded already, so that Ctrl-C is handled before NumPy is imported.
"""

import errno
import os
import sys


def main() -> None:
    """Run the command and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    try:
        import gc

        from gpt_xp.cli.interrupts import let_interrupt_exit, resend_interrupt

        sys.unraisablehook = resend_interrupt
        gc.set_threshold(50_000)  # to look for garbage in a tokenizer, 100 000 objects, while it is made takes 20 ms
        code = run()
        let_interrupt_exit()

        from gpt_xp.cli.output import settle_stderr

        settle_stderr()
        gc.freeze()  # or Python would look through all of JAX for garbage at the end, for 0.3 s
    except KeyboardInterrupt:  # in the few milliseconds around `run`
        os._exit(130)
    sys.exit(code)


def run() -> int:
    """Run the command with the arguments of this process, and return its exit code: the one edge of all errors."""
    from gpt_xp.cli.interrupts import exit_on_interrupt

    with exit_on_interrupt():
        import click

        from gpt_xp.cli.group import cli
        from gpt_xp.cli.output import discard_stdout, make_encodable, note, notes_of_warnings
        from gpt_xp.errors import GptXpError

    make_encodable()
    try:
        with notes_of_warnings():
            return cli.main(prog_name="gpt-xp", standalone_mode=False) or 0
    except click.Abort:  # so click calls a KeyboardInterrupt, after a newline on stderr
        return 130
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except (GptXpError, click.ClickException) as error:
        note(f"error: {error}")
    except OSError as error:  # of a disk that is full, or a file that cannot be read
        discard_stdout()
        what = error if error.filename or error.errno != errno.ENOSPC else f"cannot write to stdout: {error.strerror}"
        note(f"error: {what}")
    return 1
