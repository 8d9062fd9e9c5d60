"""`gpt-xp bench`: measure how fast one model is on several array libraries."""

import functools
from pathlib import Path

import click

import gpt_xp
from gpt_xp import json_text
from gpt_xp.cli.options import CONTEXT, COUNT, flag, json_option, model_option, names, option
from gpt_xp.cli.output import waiting, write, write_json
from gpt_xp.cli.wording import Command
from gpt_xp.hub.find import find_model


def counts(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Return the numbers that commas separate. Fail where one is not a whole number above 0."""
    return None if value is None else [COUNT(each, param, ctx) for each in names(value)]


@click.command(cls=Command, context_settings=CONTEXT)
@option(
    "--backends",
    of="bench",
    metavar="NAMES",
    help='Such as numpy,numpy+int8,torch@cuda ("+": quantized, "@": a device).  [default: all that can be used]',
)
@option("--dtypes", metavar="NAMES", default="float32", show_default=True, help="Such as float32,bfloat16.")
@model_option
@option(
    "--context",
    metavar="NUMBERS",
    callback=counts,
    help="Tokens in a prompt, such as 16,128,512.  [default: three that suit the model]",
)
@option(
    "--batch",
    metavar="NUMBERS",
    callback=counts,
    default="1",
    show_default=True,
    help="Prompts in a batch, such as 1,8.",
)
@option(
    "-n",
    "--max-tokens",
    of="bench",
    metavar="N",
    type=COUNT,
    help="Tokens to generate from each prompt.  [default: 17, or as many as fit]",
)
@option("--rounds", metavar="N", type=COUNT, default=7, show_default=True, help="Turns of each contender.")
@option("--threads", metavar="N", type=COUNT, help="Threads of the CPU.  [default: the number of cores]")
@json_option
@flag("--markdown", help="Print tables in Markdown.")
@option(
    "--plot",
    of="bench",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Draw FILE (png, svg, pdf).",
)
@click.pass_context
def bench(
    ctx: click.Context,
    backends: str | None,
    dtypes: str,
    model: str | None,
    offline: bool,
    context: list[int] | None,
    batch: list[int],
    max_tokens: int | None,
    rounds: int,
    threads: int | None,
    as_json: bool,
    markdown: bool,
    plot: str | None,
) -> None:
    """Measure how fast a model is on several array libraries, which take turns.

    Each is compared with the matrix products alone (floor), the limit of the machine. The logits of all are compared
    first. The exit code is 1 if they differ, if a backend fails, or if none can be measured.
    """
    from gpt_xp.benchmark import report
    from gpt_xp.benchmark.plot import save_plot
    from gpt_xp.reporting.plots import check_plot

    if plot is not None:
        check_plot(Path(plot))
    find_model(model, offline=offline)  # A download shows its own progress bar.
    found = gpt_xp.bench(
        None if backends is None else names(backends), model, dtypes=names(dtypes), context=context, batch=batch,
        max_tokens=max_tokens, rounds=rounds, threads=threads, progress=functools.partial(waiting, exit_at_once=False),
    )  # fmt: skip
    if as_json:
        write_json(found.as_dict())
    else:
        write((report.as_markdown if markdown else report.as_text)(found))
    if plot is not None:
        save_plot(found, Path(plot))
    ctx.exit(0 if found.is_ok else 1)


@click.command("bench-worker", hidden=True)
@click.argument("job")
def bench_worker(job: str) -> None:
    """Run one contender of a benchmark, which JOB describes in JSON. `gpt_xp.bench` starts this process."""
    from gpt_xp.benchmark.contenders import make
    from gpt_xp.benchmark.worker import serve

    serve(lambda: make(json_text.parse(job)))
