"""The options that commands share, and those of generation.

Each option can also be set by an environment variable, `GPT_XP_` and its long name in capitals.
"""

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from gpt_xp import json_text
from gpt_xp.errors import JsonError
from gpt_xp.quantization import KINDS

CONTEXT = {"help_option_names": ["--help", "-h"], "max_content_width": 100}
COUNT = click.IntRange(min=1)
DTYPES = click.Choice(["float32", "float64", "float16", "bfloat16"])
FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)

Decorator = Callable[[Any], Any]


class StopType(click.types.StringParamType):
    """Any text; in the environment a JSON list of texts, so that each may hold spaces and newlines."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the texts in the value of an environment variable."""
        try:
            stops = json_text.parse(rv)
        except JsonError:
            stops = None
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            self.fail(f'GPT_XP_STOP must be a JSON list of strings, such as ["\\n\\n", "END"], not {rv}')
        return stops


class Option(click.Option):
    """An option that errors call by its variable when the value came from there."""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the name for error messages."""
        from_variable = ctx is not None and ctx.get_parameter_source(str(self.name)) is ParameterSource.ENVIRONMENT
        return str(self.envvar) if from_variable else super().get_error_hint(ctx)


def option(*names: str, **settings: Any) -> Decorator:
    """Return `click.option` with the environment variable of that name."""
    long = next(name for name in names if name.startswith("--"))
    return click.option(*names, cls=Option, envvar="GPT_XP_" + long[2:].replace("-", "_").upper(), **settings)


def flag(*names: str, **settings: Any) -> Decorator:
    """Return an option that is there or not."""
    return option(*names, is_flag=True, **settings)


def together(*decorators: Decorator) -> Decorator:
    """Return several decorators as one; help lists their options in this order."""

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
loading_options = together(
    model_option,
    click.option("--model_size", hidden=True),  # picoGPT's two
    click.option("--models_dir", hidden=True),
    option(
        "-b", "--backend", metavar="NAME",
        help="numpy, jax, torch or cupy: see `gpt-xp backends`.  [default: numpy]",
    ),
    option("--device", metavar="NAME", help="A device of the backend, such as cpu, gpu or cuda:1."),
    option(
        "--dtype", metavar="DTYPE", type=DTYPES, default="float32", show_default=True,
        help="float32, float64, or where the backend computes in it float16 or bfloat16.",
    ),
    option(
        "--quantize", metavar="KIND", type=click.Choice(KINDS),
        help="Keep the weights in 8 or 4 bits, int8 or int4: faster and smaller, and a little less exact.",
    ),
    option("--threads", metavar="N", type=COUNT, help="Threads of the CPU to use.  [default: the library's choice]"),
)  # fmt: skip
sampling_options = together(
    option(
        "-n", "--max-tokens", "--n_tokens_to_generate", metavar="N", type=COUNT, default=40, show_default=True,
        help="End after N tokens.",
    ),
    option(
        "--temperature", metavar="X", type=float, default=0.0, show_default=True,
        help="0 takes the likeliest token each time, 1 draws as the model says.",
    ),
    option("--top-k", metavar="N", type=int, help="Draw from the N likeliest tokens (0: from all)."),
    option("--top-p", metavar="P", type=float, help="Draw from the fewest tokens that P of the probability is in."),
    option("--min-p", metavar="P", type=float, help="Draw from tokens at least P times as likely as the likeliest."),
    option("--repetition-penalty", metavar="X", type=float, help="Above 1: make tokens that were there less likely."),
    option("--stop", multiple=True, type=StopType(), help="End before this text. May be given several times."),
    option("--seed", metavar="N", type=int, help="Same seed, same text.  [default: drawn, and told on stderr]"),
    option("--num-samples", metavar="N", type=COUNT, default=1, show_default=True, help="Continue the prompt N times."),
    flag("--ignore-eos", help="Go on after an end token such as <|endoftext|>."),
    flag("--speculate", help="Guess from repeats in the text and check several tokens at once: same text, sooner."),
)  # fmt: skip
output_options = together(
    flag("--no-stream", help="Print the text at the end, on a terminal too."),
    flag("--echo", help="Print the prompt before its continuation."),
    flag("--logprobs", help="Show each token's log probability (natural): as a table on stderr, or in the JSON."),
    json_option,
    flag("--stats", help="Print a line of statistics to stderr."),
    flag("--json-full", help="As --json; with --prompt-file, print the settings and statistics in each line."),
    option(
        "--prompt-file", metavar="FILE", type=FILE, multiple=True,
        help="Continue every line of FILE (-: of stdin), and print JSON lines. All of them may be JSON objects "
        "with a field `prompt` instead; their other fields are printed as `input`. Empty lines are skipped. A line "
        "that cannot be continued has an `error`, and the exit code is 1. May be given several times.",
    ),
    flag("--strict", help="Print nothing if a line of --prompt-file cannot be continued."),
    option(
        "--batch-size", metavar="N", type=COUNT, default=8, show_default=True,
        help="Lines of --prompt-file to continue at a time.",
    ),
)  # fmt: skip


def names(text: str) -> list[str]:
    """Return the names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
