"""`gpt-xp compare`: show how far the results of several array libraries differ for one model."""

import functools
from collections.abc import Sequence
from pathlib import Path

import click

import gpt_xp
from gpt_xp.cli.interrupts import clean_up_on_sigterm
from gpt_xp.cli.options import CONTEXT, COUNT, TEXT, flag, json_option, model_option, names, option
from gpt_xp.cli.output import waiting, write, write_json
from gpt_xp.cli.wording import Command
from gpt_xp.hub.find import find_model


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1, type=TEXT)
@option(
    "--backends",
    of="compare",
    metavar="NAMES",
    help='Such as numpy,jax@cpu ("@": a device).  [default: all that can be used]',
)
@option("--dtypes", metavar="NAMES", default="float32", show_default=True, help="Such as float32,bfloat16.")
@model_option
@option(
    "-n",
    "--max-tokens",
    of="compare",
    metavar="N",
    type=COUNT,
    default=32,
    show_default=True,
    help="Tokens to generate from each prompt.",
)
@option(
    "--seed",
    of="compare",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the sampled tokens.",
)
@option("--threads", metavar="N", type=COUNT, help="Threads of the CPU.")
@json_option
@flag("--layers", help="Also show the error after each layer.")
@flag("--markdown", help="Print tables in Markdown.")
@option(
    "--plot",
    of="compare",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Draw FILE (png, svg, pdf).",
)
@click.pass_context
@clean_up_on_sigterm()
def compare(
    ctx: click.Context,
    prompts: Sequence[str],
    backends: str | None,
    dtypes: str,
    model: str | None,
    offline: bool,
    max_tokens: int,
    seed: int,
    threads: int | None,
    as_json: bool,
    layers: bool,
    markdown: bool,
    plot: str | None,
) -> None:
    """Run a model on several array libraries, and show how far they differ from float64 on NumPy.

    Without PROMPT, a fixed set of prompts is used. The exit code is 1 if a backend is outside the tolerance of its
    dtype.
    """
    from gpt_xp.comparison import report
    from gpt_xp.comparison.plot import save_plot
    from gpt_xp.reporting.plots import check_plot

    if plot is not None:
        check_plot(Path(plot))
    find_model(model, offline=offline)  # A download shows its own progress bar.
    found = gpt_xp.compare(
        None if backends is None else names(backends), model, prompts or None, dtypes=names(dtypes),
        max_tokens=max_tokens, seed=seed, threads=threads, progress=functools.partial(waiting, exit_at_once=False),
    )  # fmt: skip
    if as_json:
        write_json(found.as_dict())
    else:
        write((report.as_markdown if markdown else report.as_text)(found, layers))
    if plot is not None:
        save_plot(found, Path(plot))
    ctx.exit(0 if found.is_ok else 1)


@click.command("compare-backend", hidden=True)
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare_backend(job: Path) -> None:
    """Run one backend of a comparison. `gpt_xp.compare` starts this process."""
    from gpt_xp.comparison.worker import work

    work(job)
