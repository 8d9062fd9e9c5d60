"""`gpt-xp tokens`: how a text is cut into tokens."""

import json
from collections.abc import Sequence

import click

from gpt_xp._text import table
from gpt_xp.cli.options import CONTEXT, json_option, model_option
from gpt_xp.cli.output import write, write_json
from gpt_xp.cli.prompts import PromptCommand, read_prompt
from gpt_xp.cli.session import locate, tell_default
from gpt_xp.tokenizer import Tokenizer


@click.command(cls=PromptCommand, context_settings=CONTEXT)
@click.argument("words", metavar="[TEXT]", nargs=-1)
@model_option
@json_option
@click.pass_context
def tokens(ctx: click.Context, words: Sequence[str], model: str | None, offline: bool, as_json: bool) -> None:
    """Show the tokens of TEXT, or of stdin.

    For each its id, how the vocabulary writes it, and the text it stands for: in hex where it is not whole characters.
    """
    text = read_prompt(ctx, words)
    if model is None:
        tell_default()
    name, directory = locate(model, offline)
    tokenizer = Tokenizer.from_directory(directory)
    rows = [(id, tokenizer.decoder[id], tokenizer.token_bytes(id)) for id in tokenizer.encode(text)]
    if as_json:
        records = [{"id": id, "token": token, "bytes": data.hex(), "text": _text(data)} for id, token, data in rows]
        write_json({"model": name, "tokens": records})
    else:
        shown = [(str(id), token, _shown(data)) for id, token, data in rows]
        write(table([("id", "token", "text"), *shown]))


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _shown(data: bytes) -> str:
    text = _text(data)
    return f"<{data.hex(' ')}>" if text is None else json.dumps(text, ensure_ascii=False)
