"""`gpt-xp tokens`: show the tokens of a text."""

import json
from collections.abc import Sequence
from typing import Any

import click

from gpt_xp.cli.loading import locate, note_default_model
from gpt_xp.cli.options import CONTEXT, TEXT, flag, json_option, model_option, special_tokens_option
from gpt_xp.cli.output import write, write_json, write_json_list, write_many
from gpt_xp.cli.prompts import PromptCommand, note_special_tokens, read_prompt
from gpt_xp.reporting.text import spelled, table_lines
from gpt_xp.tokenizer.bpe import Tokenizer


@click.command(cls=PromptCommand, context_settings=CONTEXT)
@click.argument("words", metavar="[TEXT]", nargs=-1, type=TEXT)
@model_option
@special_tokens_option
@flag("--count", help="Print only the number of tokens.")
@json_option
@click.pass_context
def tokens(
    ctx: click.Context,
    words: Sequence[str],
    model: str | None,
    offline: bool,
    special_tokens: bool,
    count: bool,
    as_json: bool,
) -> None:
    """Show the tokens of TEXT, or of stdin.

    Each token is shown with its id, its spelling in the vocabulary, and its text; in hex where it is not whole
    characters.
    """
    text = read_prompt(ctx, words)
    if model is None:
        note_default_model()
    name, directory = locate(model, offline)
    tokenizer = Tokenizer.from_directory(directory)
    note_special_tokens(tokenizer, [text], special_tokens)
    ids = tokenizer.encode(text, special_tokens=special_tokens)
    # Only distinct tokens are held in memory, because a text repeats most of its tokens.
    distinct = {id: (tokenizer.decoder[id], tokenizer.token_bytes(id)) for id in dict.fromkeys(ids)}
    if count and as_json:
        write_json({"model": name, "count": len(ids)})
    elif count:
        write(f"{len(ids)}\n")
    elif as_json:
        records = {id: json.dumps(_record(id, *each)) for id, each in distinct.items()}
        write_json_list({"model": name}, "tokens", map(records.__getitem__, ids))
    else:
        rows = [(str(id), token, spelled(data)) for id, (token, data) in distinct.items()]
        header, *lines = table_lines([("id", "token", "text"), *rows])
        line_of = dict(zip(distinct, lines, strict=True))
        write(header)
        write_many(map(line_of.__getitem__, ids))


def _record(id: int, token: str, data: bytes) -> dict[str, Any]:
    return {"id": id, "token": token, "bytes": data.hex(), "text": _text(data)}


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
