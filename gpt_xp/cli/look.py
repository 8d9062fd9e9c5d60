"""`gpt-xp look`: show what happens inside the model for one prompt."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_xp.atomic_files import check_place
from gpt_xp.cli.interrupts import clean_up_on_sigterm
from gpt_xp.cli.loading import load_model, locate
from gpt_xp.cli.options import (
    CONTEXT,
    SIZE,
    TEXT,
    flag,
    loading_options,
    names,
    note_no_effect,
    option,
    special_tokens_option,
)
from gpt_xp.cli.output import note, waiting, write
from gpt_xp.cli.prompts import PromptCommand, note_special_tokens, read_prompt
from gpt_xp.cli.several import leave_mesh_aside
from gpt_xp.comparison.driver import check_backends
from gpt_xp.inspection.results import MAX_SIZE
from gpt_xp.reporting.text import size

if TYPE_CHECKING:
    from gpt_xp.inspection.server import LookServer
    from gpt_xp.model import Model


@click.command(cls=PromptCommand, context_settings=CONTEXT)
@click.argument("words", metavar="[PROMPT]", nargs=-1, type=TEXT)
@option("--backends", of="look", metavar="NAMES", help="Show how far these are from float64, such as numpy,jax@cpu.")
@option("--html", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to FILE.")
@option(
    "--max-size",
    metavar="SIZE",
    type=SIZE,
    default=MAX_SIZE,
    show_default="8M",
    help="Bytes that the page may have. A long prompt has smaller pictures of attention then.",
)
@flag("--serve", help="Serve the page to a browser on this machine, until Ctrl-C.")
@option("--port", of="look", metavar="N", type=click.IntRange(0, 65535), default=0, help="For --serve.  [default: any]")
@special_tokens_option
@loading_options
@click.pass_context
@clean_up_on_sigterm()
def look(
    ctx: click.Context,
    /,
    words: Sequence[str],
    backends: str | None,
    html: Path | None,
    max_size: int,
    serve: bool,
    port: int,
    special_tokens: bool,
    **loading: Any,
) -> None:
    """Show what happens inside the model for PROMPT (-: stdin): in tables, in a page, or in a browser.

    It shows the tokens and the surprise of each, the next token, the logit lens, attention, and with --backends the
    distance of each array library from float64, layer by layer.
    """
    prompt = read_prompt(ctx, words)
    leave_mesh_aside(ctx, loading)
    compared = None if backends is None else check_backends(names(backends), [loading["dtype"]])
    if html is not None:
        check_place(html, "a page")
    if not (html or serve):
        note_no_effect(ctx, ["max_size"], "without --html or --serve")
    if not serve:
        note_no_effect(ctx, ["port"], "without --serve")
    server = _server(port) if serve else None  # A port that is taken is an error before anything is computed.
    name, model = load_model(**loading)
    note_special_tokens(model.tokenizer, [prompt], special_tokens)
    from gpt_xp.inspection.look import look as look_at
    from gpt_xp.inspection.report import as_text, verdicts

    with _source(model, loading, compared) as source:
        looking = functools.partial(
            look_at, model, max_size=max_size, special_tokens=special_tokens, name=name, source=source,
            threads=loading["threads"], progress=functools.partial(waiting, exit_at_once=False),
            for_page=serve or html is not None,
        )  # fmt: skip
        found = looking(prompt, compared)
        if html is not None:
            found.save(html)
            note(f"{html} has {size(html.stat().st_size)}")
            for verdict in verdicts(found):
                note(verdict)
        if server is not None:
            write(f"{server.url}\n")
            note("open this address in a browser on this machine; Ctrl-C ends the server")
            server.serve(model, found, lambda text, position, again: looking(
                text, compared if again else None, position=position
            ))  # fmt: skip
        elif html is None:
            write(as_text(found))


@contextlib.contextmanager
def _source(model: "Model", loading: dict[str, Any], compared: Sequence[str] | None) -> Iterator[Path | None]:
    """Yield the directory of the model for the processes of backends; quantized weights are saved once."""
    if not compared:
        yield None
    elif loading["quantize"]:
        with tempfile.TemporaryDirectory(prefix="gpt-xp-look-") as folder:
            model.save(folder)
            yield Path(folder)
    else:
        yield locate(*(loading[name] for name in ("model", "offline", "model_size", "models_dir")))[1]


def _server(port: int) -> "LookServer":
    from gpt_xp.inspection.server import LookServer

    return LookServer(port)
