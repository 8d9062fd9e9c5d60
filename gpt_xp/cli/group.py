"""The command `gpt-xp`: a group of commands, the first of which need not be named."""

import click
from click.shell_completion import CompletionItem

from gpt_xp import __version__
from gpt_xp.cli.backends import backends
from gpt_xp.cli.bench import bench, bench_worker
from gpt_xp.cli.compare import compare, compare_backend
from gpt_xp.cli.generate import generate
from gpt_xp.cli.models import models
from gpt_xp.cli.options import CONTEXT
from gpt_xp.cli.prompts import IMPLIED
from gpt_xp.cli.score import score
from gpt_xp.cli.tokenizer import tokenizer
from gpt_xp.cli.tokens import tokens
from gpt_xp.cli.train import train


class DefaultGroup(click.Group):
    """A group with a default command, which gets all arguments that do not begin with a command's name."""

    def __init__(self, *, default: click.Command, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.default = default
        self.add_command(default)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the default command in front where no command is named."""
        own = {*self.commands, *ctx.help_option_names, "--version"}
        # A shell that completes the first word may want a command or an option: see `shell_complete`.
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
        return list({item.value: item for item in items}.values())  # both have --help


cli = DefaultGroup(
    name="gpt-xp",
    default=generate,
    help=generate.help,
    epilog=generate.epilog,
    context_settings=CONTEXT,
    commands=[backends, bench, bench_worker, compare, compare_backend, models, score, tokenizer, tokens, train],
)
click.version_option(__version__, prog_name="gpt-xp", message="%(prog)s %(version)s")(cli)
