"""`gpt-xp models`: list, fetch, find, verify and remove the models that have names."""

from typing import Any, NoReturn

import click

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.cli.options import CONTEXT, json_option
from gpt_xp.cli.output import note, waiting, write, write_json
from gpt_xp.environment import gpt_xp_home, gpt_xp_home_text
from gpt_xp.errors import ModelNotFoundError
from gpt_xp.hub import store
from gpt_xp.hub.find import BUNDLED, bundled, default_model, find_model, get_published
from gpt_xp.hub.published import MODELS, Published, find_published
from gpt_xp.registry import get_backend
from gpt_xp.reporting.text import size, table

EPILOG = """\
Models are kept in GPT_XP_HOME (default: the user's cache folder). The variables HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_CACHE, HTTPS_PROXY and GPT_XP_OFFLINE=1 are used too.
"""


@click.group(invoke_without_command=True, context_settings=CONTEXT, epilog=EPILOG)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models that have names, and which of them are here; fetch, find, verify or remove them."""
    if ctx.invoked_subcommand is None:
        show(as_json)


@models.command("list", context_settings=CONTEXT)
@json_option
@click.pass_context
def list_models(ctx: click.Context, as_json: bool) -> None:
    """List the models that have names, and which of them are here."""
    assert ctx.parent is not None
    show(as_json or ctx.parent.params["as_json"])


@models.command(context_settings=CONTEXT)
@click.argument("name")
@click.option("--source", type=click.Choice(store.SOURCES), help="The Hub (default), or OpenAI's bucket.")
def pull(name: str, source: str | None) -> None:
    """Fetch the model NAME, verify it, and print where it is."""
    model = get_published(name)
    here = [copy for copy in store.copies(model) if source in (None, copy.source)]
    write(f"{here[0].folder if here else store.pull(model, source or 'hub')}\n")


@models.command(context_settings=CONTEXT)
@click.argument("name")
def path(name: str) -> None:
    """Print the directory of the model NAME, which must be here."""
    if model := find_published(name):
        copies = store.copies(model) or _is_not_here(model)
        write(f"{copies[0].folder}\n")
    else:
        write(f"{find_model(name)}\n")


@models.command(context_settings=CONTEXT)
@click.argument("name")
def rm(name: str) -> None:
    """Remove the files of the model NAME that gpt-xp has fetched."""
    model = get_published(name)
    removed = store.remove(model)
    for folder in removed:
        note(f"removed {folder}")
    for copy in store.copies(model):
        note(f"{copy.folder} is not gpt-xp's, and stays")
    if not removed:
        raise ModelNotFoundError(f"gpt-xp has nothing of {model.name} in {gpt_xp_home_text()}")


@models.command(context_settings=CONTEXT)
@click.argument("name", required=False)
@click.pass_context
def verify(ctx: click.Context, name: str | None) -> None:
    """Read the files of the model NAME, or of all models that are here, and check their hashes.

    A damaged file is removed, and fetched again the next time the model is used.
    """
    asked = [get_published(name)] if name else list(MODELS.values())
    found = [(model, copy) for model in asked for copy in store.stored(model)]
    if name and not found:
        _is_not_here(asked[0])
    if not found:
        note(f"there is nothing to verify in {gpt_xp_home_text()}")
    bad = [copy for model, copy in found if not _verify(copy, model)]
    for copy in bad:
        fate = (
            "remove it there" if copy.source == store.HUB_CACHE else "the next use of the model fetches what is missing"
        )
        note(f"{copy.folder} is not whole: {fate}")
    ctx.exit(1 if bad else 0)


@models.command(context_settings=CONTEXT)
@click.argument("name")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="As for gpt-xp."
)
def pack(name: str, dtype: str) -> None:
    """Write a copy of the weights of the model NAME that the backend native maps at its start, and print its path.

    It lies beside the model's own file, and takes 4 bytes for each weight (2 with float16). Without it, each start
    packs the weights in memory. Starts with --quantize do not use it. A published model that is not here is fetched.
    """
    backend = get_backend("native", dtype=dtype)
    folder = find_model(name)
    with waiting(f"packing {name}"):
        path = backend.write_copy(folder)
    write(f"{path}\n")


def _verify(copy: store.Copy, model: Published) -> bool:
    right = []
    for file in store.verifiable(copy, model):
        with waiting(f"reading {model.name} {file}"):
            right.append(_is_right(copy, model, file))
        write(f"{'ok     ' if right[-1] else 'DAMAGED'}  {copy.folder / file}\n")
    return all(right) and store.is_whole(copy)


def _is_right(copy: store.Copy, model: Published, file: str) -> bool:
    try:
        return store.verify(copy, model, file)
    except OSError as error:
        note(f"{copy.folder / file} cannot be read: {error.strerror}")
        return False


def _is_not_here(model: Published) -> NoReturn:
    raise ModelNotFoundError(f"{model.name} is not here: `gpt-xp models pull {model.name}` fetches it")


def show(as_json: bool) -> None:
    """Print the models as a table or JSON."""
    records = [_record(model) for model in MODELS.values()] + [_bundled_record(name) for name in bundled()]
    if as_json:
        write_json(
            {
                "folder": None if (home := gpt_xp_home()) is None else str(home),
                "default": default_model(),
                "models": records,
            }
        )
        return
    rows = [("model", "also called", "params", "float32", "here")]
    for record in records:
        also = ", ".join(alias for alias in record["aliases"] if "/" not in alias)
        n_params = record["n_params"]
        here = ", ".join(f"{size(copy['n_bytes'])} ({copy['source']})" for copy in record["copies"]) or "no"
        rows.append((record["name"], also, f"{n_params / 1e6:.1f}M", size(4 * n_params), here))
    write(table(rows))
    write(f"`gpt-xp models pull NAME` fetches one; they are kept in {gpt_xp_home_text()}\n")


def _record(model: Published) -> dict[str, Any]:
    copies = [
        {"source": copy.source, "folder": str(copy.folder), "n_bytes": copy.n_bytes} for copy in store.copies(model)
    ]
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "n_params": model.config.n_params,
        "repo": model.repo,
        "revision": model.revision,
        "copies": copies,
    }


def _bundled_record(name: str) -> dict[str, Any]:
    copy = store.Copy("bundled", BUNDLED / name)
    return {
        "name": name,
        "aliases": [],
        "n_params": read_config(copy.folder).n_params,
        "repo": None,
        "revision": None,
        "copies": [{"source": copy.source, "folder": str(copy.folder), "n_bytes": copy.n_bytes}],
    }
