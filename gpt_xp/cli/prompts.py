"""Read a prompt from the command line, stdin, or both."""

import array
import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Sequence

import click

from gpt_xp.cli.output import is_terminal, note, show
from gpt_xp.cli.several import refuse_stdin
from gpt_xp.cli.wording import Command
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.text_files import Source, read_text, stdin

# Keys of ctx.meta.
IMPLIED = "gpt_xp.cli.implied"  # true where the command was not named
LITERAL = "gpt_xp.cli.literal"  # the number of words after `--`


class PromptCommand(Command):
    """A command that takes a prompt. A word "-" after `--` is a prompt, and not stdin."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Count the words after `--` before click removes it."""
        ctx.meta[LITERAL] = len(args) - args.index("--") - 1 if "--" in args else 0
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.possibilities:
                raise
            # It is not a misspelt option, so perhaps it is a prompt.
            message = f'{error.message} A prompt that begins with "-" goes after "--".'
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None


def read_prompt(ctx: click.Context, words: Sequence[str]) -> str:
    """Return the prompt that `words` give. Without words, and with a terminal as stdin, print the help and exit."""
    if not words and is_terminal(sys.stdin):
        click.echo((ctx.find_root() if ctx.meta.get(IMPLIED) else ctx).get_help())
        ctx.exit()
    words = words or ("-",)
    n_plain = len(words) - ctx.meta[LITERAL]
    is_stdin = [word == "-" and index < n_plain for index, word in enumerate(words)]
    if n_plain:
        _hint_at_command(ctx, words[0])
    if is_stdin.count(True) > 1 or is_stdin.count(False) > 1:
        raise click.UsageError(f"the prompt is one argument, and {words[-1]!r} is one too many: put quotes around it")
    return join_stdin(words, is_stdin)


def join_stdin(words: Sequence[str], is_stdin: Sequence[bool]) -> str:
    """Return the words as one text, with stdin in place of those for which `is_stdin` is true.

    One newline at the end of stdin is removed. Raises `TextError` where stdin cannot be read or is not UTF-8, and a
    usage error where the text is then empty.
    """
    if not any(is_stdin):
        note_unread_stdin()
        return "".join(words)
    refuse_stdin()
    read = re.sub(r"\r?\n\Z", "", read_text(stdin()))
    text = "".join(read if here else word for here, word in zip(is_stdin, words, strict=True))
    if not text:
        raise click.UsageError('no text was given, and stdin is empty; write "" for an empty text')
    return text


def sources(files: Sequence[str]) -> list[Source]:
    """Return the files, with stdin in place of "-".

    Raises `TextError` where stdin is closed, and a usage error where "-" is given twice.
    """
    if files.count("-") > 1:
        raise click.UsageError("stdin (-) can be read only once")
    if "-" in files:
        refuse_stdin()
    else:
        note_unread_stdin()
    return [stdin() if file == "-" else file for file in files]


def note_unread_stdin() -> None:
    """Write a line to stderr where stdin holds text that the command does not read."""
    if n_waiting() and not is_terminal(sys.stdin):
        note('stdin is not read: put "-" where its text belongs')


def n_waiting() -> int:
    """Return how many bytes can be read from stdin at once; 0 where this is not known, as on Windows."""
    n_bytes = array.array("i", [0])
    with contextlib.suppress(AttributeError, ImportError, OSError, ValueError):  # stdin is closed, or no pipe or file.
        import fcntl
        import termios

        fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, n_bytes)
    return n_bytes[0]


# Words that are commands of other tools or subcommands of this one, and surely not meant as a prompt.
ELSEWHERE = {
    "list": "gpt-xp models",
    "ls": "gpt-xp models",
    "path": "gpt-xp models path MODEL",
    "pull": "gpt-xp models pull MODEL",
    "download": "gpt-xp models pull MODEL",
    "rm": "gpt-xp models rm MODEL",
    "run": 'gpt-xp -m MODEL "PROMPT"',
    "verify": "gpt-xp models verify",
    "version": "gpt-xp --version",
}


def _hint_at_command(ctx: click.Context, word: str) -> None:
    """Write a hint where the prompt may be meant as a command; raise a usage error where it surely is."""
    group = ctx.find_root().command
    if not (ctx.meta.get(IMPLIED) and isinstance(group, click.Group)):
        return
    if word in ELSEWHERE:
        raise click.UsageError(
            f"there is no command {word!r}; you may mean: {ELSEWHERE[word]} (as a prompt: gpt-xp -- {word})"
        )
    for command in difflib.get_close_matches(word, group.list_commands(ctx), n=1, cutoff=0.8):
        show(f"hint: {word!r} is the prompt here; a command's name comes first: gpt-xp {command}")


def note_special_tokens(tokenizer: Tokenizer | None, texts: Iterable[str], special_tokens: bool) -> None:
    """Write a line to stderr where a text spells a special token that is read as plain text."""
    if special_tokens or tokenizer is None:
        return
    if spelled := next(filter(None, map(tokenizer.first_special, texts)), None):
        note_plain_token(spelled)


def note_plain_token(token: str) -> None:
    """Write a line to stderr that this special token was read as plain text."""
    note(f"{token} in the text is read as plain text; --special-tokens reads it as one token")
