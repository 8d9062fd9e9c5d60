"""The options that several commands share, and those of generation.

An environment variable can set each option: `GPT_XP_` and the long name in capitals. The name of the command stands
between them where another command has an option of that name with another meaning. A variable is set once for many
calls. So it is silently ignored where it does not apply, unlike an option on the command line.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import click

from gpt_xp import json_text
from gpt_xp.cli.output import note
from gpt_xp.cli.wording import Option, is_typed
from gpt_xp.environment import is_yes
from gpt_xp.errors import JsonError
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.quantization import KINDS

CONTEXT = {"help_option_names": ["--help", "-h"], "max_content_width": 100}
COUNT = click.IntRange(min=1)
DTYPES = click.Choice([*ITEM_SIZE])
FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)

Decorator = Callable[[Any], Any]


class TextType(click.types.StringParamType):
    """Text that can be written as UTF-8. Python represents other bytes of an argument as lone surrogates."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text; fail with advice where it is not UTF-8."""
        text = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
            self.fail(
                f"character {error.start + 1} is {what}, and the text is not UTF-8. Set the terminal to UTF-8, or pipe "
                "the text in: iconv -f latin1 -t utf-8 FILE | gpt-xp",
                param,
                ctx,
            )
        return text


TEXT = TextType()


class StopType(TextType):
    """Text; in an environment variable a JSON list of texts, so that they may hold spaces and newlines."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the texts in the value of an environment variable."""
        try:
            stops = json_text.parse(rv)
        except JsonError:
            stops = None
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            self.fail(f'GPT_XP_STOP must be a JSON list of strings, such as ["\\n\\n", "END"], not {rv}')
        return stops


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 500000, 64K or 16M."""

    name = "size"
    UNITS: ClassVar = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; fail for anything else."""
        match = re.fullmatch(r"(\d+) ?([kmg]?)(i?b)?", str(value).lower())
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is not a size: expected a number of bytes, such as 500000, 64K or 16M", param, ctx)
        return int(match[1]) * self.UNITS[match[2]]


SIZE = SizeType()


class Flag(Option):
    """An option without a value. Its variable sets it, unless the variable says no."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return "1" or "0", or None where the variable is not set."""
        value = os.environ.get(str(self.envvar))  # click 8.2.0 would give "True" for every value.
        return str(int(is_yes(value))) if value else None


def option(*names: str, of: str | None = None, cls: type[Option] = Option, **settings: Any) -> Decorator:
    """Return `click.option` with an environment variable for it.

    `of` is the name of the command, for an option that has another meaning in another command. The name of the variable
    then has it.
    """
    long = next(name for name in names if name.startswith("--"))
    variable = "_".join(["GPT_XP", *([of] if of else []), *long[2:].split("-")]).upper()
    return click.option(*names, cls=cls, envvar=variable, **settings)


def flag(*names: str, **settings: Any) -> Decorator:
    """Return an option without a value."""
    return option(*names, cls=Flag, is_flag=True, **settings)


def together(*decorators: Decorator) -> Decorator:
    """Return several decorators as one; the help lists their options in this order."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


model_option = together(
    option(
        "-m", "--model", metavar="MODEL",
        help="A directory, or a name: 124M, 355M, 774M, 1558M, ... (see `gpt-xp models`), fetched if it is not here.  "
        "[default: 124M if it is here, else the bundled shakespeare]",
    ),
    flag("--offline", help="Never use the network."),
)  # fmt: skip
json_option = flag("--json", "as_json", help="Print JSON, one object a line, with a version number `schema`.")
logprobs_option = flag(
    "--logprobs", help="Show each token's log probability (natural): as a table on stderr, or in the JSON."
)
SPECIAL_TOKENS = "Read the spelling of a special token, such as <|endoftext|>, as that token and not as plain text."
special_tokens_option = flag("--special-tokens", help=SPECIAL_TOKENS)
mesh_option = together(
    option(
        "--mesh", metavar="MESH",
        help="Compute on several devices of jax: data=N splits the rows of a batch, model=N the weights, "
        "data=N,model=N both; auto is data= all devices.",
    ),
)  # fmt: skip
hosts_option = together(
    option(
        "--hosts", metavar="ADDRESS:PORT,COUNT,INDEX",
        help="For --mesh: COUNT processes run this command, each with its INDEX from 0, and number 0 listens on "
        "ADDRESS:PORT. Not needed under Slurm, Open MPI or on a TPU pod.",
    ),
)  # fmt: skip
loading_options = together(
    model_option,
    click.option("--model_size", hidden=True),  # picoGPT's two
    click.option("--models_dir", hidden=True),
    option(
        "-b", "--backend", metavar="NAME",
        help="numpy, native, jax, torch, cupy or mlx: see `gpt-xp backends`.  [default: numpy]",
    ),
    option("--device", metavar="NAME", help="A device of the backend, such as cpu, gpu or cuda:1."),
    option(
        "--dtype", metavar="DTYPE", type=DTYPES, default="float32", show_default=True,
        help="float32, float64, or where the backend computes in them float16 or bfloat16.",
    ),
    option(
        "--quantize", metavar="KIND", type=click.Choice(KINDS),
        help="Keep the weights in 8 or 4 bits, int8 or int4: faster and smaller, a little less exact. w8a8 and w4a8 "
        "(native only) are int8 and int4 that also round the input of each layer to 8 bits: long prompts are faster.",
    ),
    option("--threads", metavar="N", type=COUNT, help="Threads of the CPU to use.  [default: the library's choice]"),
    mesh_option,
)  # fmt: skip
sampling_options = together(
    option(
        "-n", "--max-tokens", "--n_tokens_to_generate", metavar="N", type=COUNT, default=40, show_default=True,
        help="End after N tokens.",
    ),
    option(
        "--temperature", metavar="X", type=float, default=0.0, show_default=True,
        help="0 takes the likeliest token each time, 1 draws with the model's probabilities.",
    ),
    option("--top-k", metavar="N", type=int, help="Draw from the N likeliest tokens (0: from all)."),
    option("--top-p", metavar="P", type=float, help="Draw from the fewest tokens with a total probability of P."),
    option("--min-p", metavar="P", type=float, help="Draw from tokens at least P times as likely as the likeliest."),
    option("--repetition-penalty", metavar="X", type=float, help="Above 1: make tokens of the text less likely."),
    option("--stop", multiple=True, type=StopType(), help="End before this text. May be given several times."),
    option("--seed", metavar="N", type=int, help="Same seed, same text.  [default: random, shown on stderr]"),
    option("--num-samples", metavar="N", type=COUNT, default=1, show_default=True, help="Continue the prompt N times."),
    flag("--ignore-eos", help="Go on after an end token such as <|endoftext|>."),
    special_tokens_option,
    flag("--speculate", help="Guess tokens from repeats in the text, and check several at once: same text, faster."),
)  # fmt: skip
output_options = together(
    flag("--no-stream", help="Print the text when it is complete, on a terminal too."),
    flag("--echo", help="Print the prompt before its continuation."),
    logprobs_option,
    json_option,
    flag("--stats", help="Print a line of statistics to stderr."),
    flag("--json-full", help="Like --json; with --prompt-file, print settings and statistics in each line."),
    option(
        "--prompt-file", metavar="FILE", type=FILE, multiple=True,
        help="Continue each line of FILE (-: of stdin), and print JSON lines. All lines may be JSON objects "
        "with a field `prompt`; their other fields are printed as `input`. Empty lines are skipped. A line "
        "that cannot be continued has an `error`, and the exit code is 1. May be given several times.",
    ),
    flag("--strict", help="Print nothing if a line of --prompt-file cannot be continued."),
    option(
        "--batch-size", metavar="N", type=COUNT, default=8, show_default=True,
        help="Lines of --prompt-file to continue at a time.",
    ),
)  # fmt: skip


def names(text: str) -> list[str]:
    """Return the names that commas separate."""
    return [name.strip() for name in text.split(",") if name.strip()]


def note_no_effect(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Write a line to stderr that names those of the options that were given and have no effect."""
    options = [each for each in ctx.command.params if isinstance(each, Option) and each.name in names]
    typed = [each.long for each in options if is_typed(ctx, str(each.name))]
    if typed:
        note(f"{' and '.join(typed)} {'has' if len(typed) == 1 else 'have'} no effect {why}")
