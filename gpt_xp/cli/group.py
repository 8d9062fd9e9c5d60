"""The command `gpt-xp`: a group of commands; where none is named, it is `generate`."""

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from gpt_xp.cli.generate import generate
from gpt_xp.cli.options import CONTEXT
from gpt_xp.cli.prompts import IMPLIED
from gpt_xp.version import __version__

# The other commands and their modules. A module is imported when its command is called, so that generating starts
# sooner.
COMMANDS = {
    "backends": "backends",
    "bench": "bench",
    "bench-worker": "bench",
    "bulk": "bulk",
    "compare": "compare",
    "compare-backend": "compare",
    "conform": "conform",
    "conform-worker": "conform",
    "look": "look",
    "models": "models",
    "score": "score",
    "tokenizer": "tokenizer",
    "tokens": "tokens",
    "train": "train",
}


class DefaultGroup(click.Group):
    """A group with a default command, which runs where the first argument is not the name of a command."""

    def __init__(self, *, default: click.Command, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.default = default
        self.add_command(default)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*self.commands, *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name; import its module now unless it is the default."""
        if cmd_name in COMMANDS:
            module = import_module(f"gpt_xp.cli.{COMMANDS[cmd_name]}")
            command: click.Command = getattr(module, cmd_name.replace("-", "_"))
            return command
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the name of the default command where no command is named."""
        own = {*self.list_commands(ctx), *ctx.help_option_names, "--version"}
        if args[:1] == ["help"] and own.issuperset(args[1:2]):  # `gpt-xp help train` works as in other tools.
            args = [*args[1:], "--help"]
        # Where a shell completes the first word, it may be a command or an option: see `shell_complete`.
        completing = ctx.resilient_parsing and not args
        if not completing and not (args and args[0] in own):
            ctx.meta[IMPLIED] = True
            args = [str(self.default.name), *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show how to generate, and how to call another command."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] [PROMPT]")
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the default command's options, this group's own, and the commands."""
        options = [each for each in (*self.default.params, *self.get_params(ctx)) if isinstance(each, click.Option)]
        records = [record for each in options if (record := each.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(records)
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the first word: a command, or an option of the default command."""
        items = super().shell_complete(ctx, incomplete) + self.default.shell_complete(ctx, incomplete)
        return list({item.value: item for item in items}.values())  # Both have --help.


cli = DefaultGroup(
    name="gpt-xp",
    default=generate,
    help=generate.help,
    epilog=generate.epilog,
    context_settings=CONTEXT,
)
click.version_option(__version__, prog_name="gpt-xp", message="%(prog)s %(version)s")(cli)
