"""Reword errors: show the name of an option or a variable in place of a Python argument."""

import re

import click
from click.core import ParameterSource

from gpt_xp.errors import CheckpointError, GptXpError, TokenizerError


class Option(click.Option):
    """An option that an environment variable can set. Errors show the variable where the value came from it.

    `setting` is its name in the library, where that is different.
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
    """A command whose errors show the names of options, not of Python's arguments."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; reword the messages of its errors."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if type(error) is not click.UsageError:  # click's own errors name their option.
                raise
            raise click.UsageError(reworded(error.message, ctx), ctx) from None
        except (CheckpointError, TokenizerError):  # Their messages name fields of files.
            raise
        except GptXpError as error:
            error.args = (reworded(str(error), ctx),)
            raise


def is_from_variable(ctx: click.Context | None, name: str | None) -> bool:
    """Return whether the value of an option came from its environment variable."""
    return ctx is not None and ctx.get_parameter_source(str(name)) is ParameterSource.ENVIRONMENT


def is_typed(ctx: click.Context, name: str) -> bool:
    """Return whether an option was given on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def reworded(message: str, ctx: click.Context) -> str:
    """Return a message of the library with the names of options, or of the variables that set them.

    A Python name is found where it has an underscore (seq_len), begins the message, or stands in parentheses. Elsewhere
    it may be an English word. Quoted words and parts of paths come from the user and stay.
    """
    options = [each for each in ctx.command.params if isinstance(each, Option)]
    for option in options:
        if str(option.envvar) in message:  # The message already names the variable.
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
