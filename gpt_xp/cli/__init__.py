"""The command line: parse options, call the library, print.

Each command has one file, and `group.py` finds it. Several commands share `options.py`, `loading.py` (the model),
`prompts.py` and `prompt_files.py` (where prompts come from) and `output.py`, which writes results to stdout and
everything else to stderr.

This module imports only what Python has already loaded, so that Ctrl-C is handled before NumPy is imported.
"""

import errno
import os
import sys


def main() -> None:
    """Run the command and exit with its code: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    try:
        import gc

        from gpt_xp.cli.interrupts import let_interrupt_exit, resend_interrupt

        sys.unraisablehook = resend_interrupt
        # Garbage collection would take 20 ms while a tokenizer of 100 000 objects is made.
        gc.set_threshold(50_000)
        code = run()
        let_interrupt_exit()

        from gpt_xp.cli.output import settle_stderr
        from gpt_xp.cli.several import end_at_once

        settle_stderr()
        end_at_once(code)
        gc.freeze()  # Otherwise Python would spend 0.3 s on garbage in JAX at the end.
    except KeyboardInterrupt:  # It came in the few milliseconds before or after `run`.
        os._exit(130)
    sys.exit(code)


def run() -> int:
    """Run the command with the arguments of this process; turn its errors into messages, and return its exit code."""
    from gpt_xp.cli.interrupts import exit_on_interrupt

    with exit_on_interrupt():
        import click

        from gpt_xp.cli.group import cli
        from gpt_xp.cli.output import discard_stdout, make_encodable, notes_of_warnings
        from gpt_xp.cli.several import show_error
        from gpt_xp.errors import GptXpError

    make_encodable()
    try:
        with notes_of_warnings():
            return cli.main(prog_name="gpt-xp", standalone_mode=False) or 0
    except click.Abort:  # click raises this for a KeyboardInterrupt, after a newline on stderr.
        return 130
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except (GptXpError, click.ClickException) as error:
        show_error(str(error))
    except OSError as error:  # The disk is full, or a file cannot be read.
        discard_stdout()
        what = error if error.filename or error.errno != errno.ENOSPC else f"cannot write to stdout: {error.strerror}"
        show_error(str(what))
    return 1
