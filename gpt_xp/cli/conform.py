"""`gpt-xp conform`: check whether an array library can run GPT-2, and how exactly."""

import os
import sys
from collections.abc import Sequence

import click

from gpt_xp.cli.interrupts import clean_up_on_sigterm
from gpt_xp.cli.options import CONTEXT, TEXT, flag, json_option, option
from gpt_xp.cli.output import note, write, write_json
from gpt_xp.cli.wording import Command
from gpt_xp.hub.find import find_model


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True, type=TEXT)
@option(
    "--jit", metavar="FUNCTION",
    help="Also trace the forward pass with this function of the library, such as jax.jit or mlx.core.compile.",
)  # fmt: skip
@option(
    "--timeout", of="conform", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), default=120,
    show_default=True, help="End a check that takes longer.",
)  # fmt: skip
@option(
    "-m", "--model", of="conform", metavar="MODEL", default="shakespeare", show_default=True,
    help="A directory, or a name that `gpt-xp models` lists.",
)  # fmt: skip
@flag("--offline", help="Never use the network.")
@json_option
@flag("--markdown", help="Print one row of a Markdown table for each MODULE, and the head.")
@click.pass_context
@clean_up_on_sigterm()
def conform(
    ctx: click.Context,
    modules: Sequence[str],
    jit: str | None,
    timeout: float,
    model: str,
    offline: bool,
    as_json: bool,
    markdown: bool,
) -> None:
    """Check whether an array library can run GPT-2, and how exactly. No adapter is needed.

    MODULE is a namespace of the array API standard, such as dask.array or mlx.core, or a name that `gpt-xp backends`
    lists. The report says which functions are missing or take other arguments, at which line the forward pass fails,
    how far each layer is from float64, whether the text is the same, and how fast it is beside NumPy.

    The library runs in a process that is ended if it hangs. The exit code is 0 only if every check is inside the
    tolerance, and 1 otherwise.
    """
    from gpt_xp.conformance import report
    from gpt_xp.conformance.adapter import check_known
    from gpt_xp.conformance.run import conform

    if jit is not None and len(modules) > 1:
        raise click.UsageError("--jit names a function of one library: give one MODULE", ctx)
    for module in modules:
        check_known(module)
    find_model(model, offline=offline)  # A download shows its own progress bar.
    found = []
    for module in modules:

        def progress(stage: str, module: str = module) -> None:
            note(f"{module}: {stage}")

        found.append(conform(module, model, jit=jit, timeout=timeout, progress=progress))
    if as_json:
        write_json({"libraries": [each.as_dict() for each in found], "is_ok": all(each.is_ok for each in found)})
    else:
        write(report.as_markdown(found) if markdown else "\n".join(map(report.as_text, found)))
    ctx.exit(0 if all(each.is_ok for each in found) else 1)


@click.command("conform-worker", hidden=True)
def conform_worker() -> None:
    """Check one library. `gpt-xp conform` starts this process."""
    from gpt_xp.conformance.worker import serve

    sys.path.append(os.getcwd())  # A library that is being written may be here. A file here hides no other module.
    serve()
