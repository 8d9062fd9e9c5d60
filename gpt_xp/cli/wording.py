"""Errors in the command's words: an option's name for Python's, and a variable's where the value came from there."""

import re

import click
from click.core import ParameterSource

from gpt_xp.errors import CheckpointError, GptXpError, TokenizerError


class Option(click.Option):
    """An option that can be set by a variable; errors call it by that where the value came from there.

    `setting` is its name in the library, where that differs from its own.
    """

    def __init__(self, *arguments: object, setting: str | None = None, **settings: object) -> None:
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]
        self.setting = setting or self.name or ""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the name for error messages."""
        return str(self.envvar) if is_from_variable(ctx, self.name) else super().get_error_hint(ctx)

    @property
    def long(self) -> str:
        """The name with two dashes."""
        return next(name for name in self.opts if name.startswith("--"))


class Command(click.Command):
    """A command whose errors speak of options, not of Python's arguments."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. Raises what it raises, reworded."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if type(error) is not click.UsageError:  # click's own, which know their option
                raise
            raise click.UsageError(reworded(error.message, ctx), ctx) from None
        except (CheckpointError, TokenizerError):  # they speak of what is in files
            raise
        except GptXpError as error:
            error.args = (reworded(str(error), ctx),)
            raise


def is_from_variable(ctx: click.Context | None, name: str | None) -> bool:
    """Return whether the value of an option came from its environment variable."""
    return ctx is not None and ctx.get_parameter_source(str(name)) is ParameterSource.ENVIRONMENT


def is_typed(ctx: click.Context, name: str) -> bool:
    """Return whether an option stands on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def reworded(message: str, ctx: click.Context) -> str:
    """Return a message of the library with the names of options, or of the variables that have set them.

    A name is known by an underscore in it (seq_len), by its place at the beginning, or by parentheses around it: the
    others are words of English too. What is quoted, or a part of a path, is the user's.
    """
    options = [each for each in ctx.command.params if isinstance(each, Option)]
    for option in options:
        if str(option.envvar) in message:  # it is named already
            continue
        shown = str(option.envvar) if is_from_variable(ctx, option.name) else option.long
        name = re.escape(option.setting)
        alone = (
            rf"(?<![\w/\\'\"-]){name}(?![\w/\\'\"-]|\.\w)"
            if "_" in name
            else rf"^{name}(?= )|(?<=\(){name}(?=\))|(?<=begun with ){name}(?= )"
        )
        message = re.sub(rf"{alone}|(?<![\w-]){re.escape(option.long)}(?![\w-])", shown, message)
    variables = [
        str(each.envvar)
        for each in options
        if is_from_variable(ctx, each.name)
        and isinstance(value := ctx.params.get(str(each.name)), str)
        and re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", message)
        and str(each.envvar) not in message
    ]
    return message + (f" ({' and '.join(variables)} {'is' if len(variables) == 1 else 'are'} set)" if variables else "")
