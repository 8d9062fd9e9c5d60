"""The command line, thin: parse, call the library, print.

One file for each command. `group.py` finds the command, `options.py` has what several commands share, `prompts.py`
and `prompt_files.py` say where prompts come from, and `output.py` writes: the continuation to stdout, everything else
to stderr.
"""

import gc
import sys

import click

from gpt_xp.cli.group import cli
from gpt_xp.cli.interrupts import resend_interrupt
from gpt_xp.cli.output import discard_stdout, make_encodable, note, notes_of_warnings, settle_stderr
from gpt_xp.errors import GptXpError


def main() -> None:
    """Run the command and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    sys.unraisablehook = resend_interrupt
    gc.set_threshold(50_000)  # to look for garbage in a tokenizer, 100 000 objects, while it is made takes 20 ms
    code = run()
    settle_stderr()
    gc.freeze()  # or Python would look through all of JAX for garbage at the end, for 0.3 s
    sys.exit(code)


def run() -> int:
    """Run the command with the arguments of this process, and return its exit code: the one edge of all errors."""
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
        note(f"error: {error}")
    return 1
