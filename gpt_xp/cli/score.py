"""`gpt-xp score`: show how likely a text is, or rank the continuations of a prompt."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import click

from gpt_xp.cli import several
from gpt_xp.cli.loading import load_model
from gpt_xp.cli.options import (
    CONTEXT,
    COUNT,
    FILE,
    TEXT,
    flag,
    hosts_option,
    json_option,
    loading_options,
    option,
    special_tokens_option,
    together,
)
from gpt_xp.cli.output import progress_bar, waiting, write, write_json
from gpt_xp.cli.prompts import LITERAL, PromptCommand, join_stdin, note_special_tokens, sources
from gpt_xp.cli.wording import is_from_variable, is_typed
from gpt_xp.errors import SettingError
from gpt_xp.model import Model
from gpt_xp.reporting.records import choice_fields, score_fields, token_fields
from gpt_xp.reporting.text import table
from gpt_xp.scoring.rank import MEASURES, RankedChoice
from gpt_xp.scoring.score import Score
from gpt_xp.scoring.windows import CONVENTIONS, Windows
from gpt_xp.tokenizer.text_files import read_text

SEED = click.IntRange(min=0, max=2**32 - 1)
FILE_OPTIONS = ("last", "convention", "window", "stride", "crops", "seed")  # options that --choices does not use
EPILOG = """\
Conventions: "huggingface" slides a window over the text and scores the new tokens, as transformers' page "Perplexity of
fixed-length models" does. "lm-eval" scores every token once, the first from bos_token_id, as lm-evaluation-harness
does. "nanogpt" scores random crops. Figures of different conventions cannot be compared. If a choice is a separate
word, begin it with a space, or end the prompt with one.
"""

window_options = together(
    option(
        "--last", metavar="X", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0,
        help="Score only the last X of the characters: 0.1 is the last tenth.",
    ),
    option(
        "--convention", metavar="NAME", type=click.Choice(CONVENTIONS), default=CONVENTIONS[0], show_default=True,
        help="How the text is cut into windows: huggingface, lm-eval or nanogpt.",
    ),
    option("--window", metavar="N", type=COUNT, help="Tokens in a window.  [default: the model's context]"),
    option("--stride", metavar="N", type=COUNT, help="For huggingface: tokens between windows.  [default: half]"),
    option("--crops", metavar="N", type=COUNT, help="For nanogpt: number of crops.  [default: 1000]"),
    option("--seed", of="score", metavar="N", type=SEED, default=0, show_default=True, help="Seed of the crops."),
)  # fmt: skip


@click.command(cls=PromptCommand, context_settings=CONTEXT, epilog=EPILOG)
@click.argument("arguments", metavar="FILE | --choices PROMPT CHOICE...", nargs=-1)
@loading_options
@hosts_option
@window_options
@special_tokens_option
@flag("--choices", help="Rank each CHOICE by how likely it is to follow PROMPT (-: stdin).")
@option(
    "--by", metavar="WHAT", type=click.Choice(MEASURES), default=MEASURES[0], show_default=True,
    help="Rank by the total log-probability, or by the mean per token or per byte.",
)  # fmt: skip
@option(
    "--batch-size",
    metavar="N",
    type=COUNT,
    default=8,
    show_default=True,
    help="Windows or choices that are computed together.",
)
@json_option
@click.pass_context
def score(
    ctx: click.Context,
    /,
    arguments: Sequence[str],
    last: float,
    convention: str,
    window: int | None,
    stride: int | None,
    crops: int | None,
    seed: int,
    special_tokens: bool,
    choices: bool,
    by: str,
    batch_size: int,
    as_json: bool,
    **loading: Any,
) -> None:
    """Print how well a model predicts the text in FILE (-: stdin), as perplexities and bits per byte."""
    several.begin(ctx, loading)
    if choices:
        _refuse(ctx, FILE_OPTIONS, "has no meaning with --choices")
        prompt = _prompt(ctx, arguments)
        name, model = load_model(**loading)
        note_special_tokens(model.tokenizer, [prompt, *arguments[1:]], special_tokens)
        with waiting("scoring", exit_at_once=False):
            ranked = model.rank(prompt, arguments[1:], by=by, batch_size=batch_size, special_tokens=special_tokens)
        if as_json:
            write_json({"prompt": prompt, "by": by, "choices": _choices(ranked, model), **_about(name, model)})
        else:
            write(_choices_table(ranked))
        return
    _refuse(ctx, ["by"], "goes with --choices")
    windows: dict[str, Any] = {
        "convention": convention,
        "window": window,
        "stride": stride,
        "crops": crops,
        "seed": seed,
    }
    for name, owner in (("stride", "huggingface"), ("crops", "nanogpt")):
        if convention != owner and is_from_variable(ctx, name):
            windows[name] = None
    try:
        Windows(**windows)  # Its errors come before a model is loaded.
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    file, text = _read(arguments)
    text = text[int((1 - last) * len(text)) :]
    name, model = load_model(**loading)
    note_special_tokens(model.tokenizer, [text], special_tokens)
    settings = {**windows, "batch_size": batch_size, "special_tokens": special_tokens}
    result, seconds = _score(model, text, settings)
    if as_json:
        write_json({"file": file, "last": last, **_record(result, seconds, model), **_about(name, model)})
    else:
        write(_table(result, seconds))


def _score(model: Model, text: str, settings: dict[str, Any]) -> tuple[Score, float]:
    """Score with a progress bar; return the score and the seconds that it took."""
    begin = time.perf_counter()
    with progress_bar(0, "token") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = model.score(text, progress=show, **settings)
    return result, time.perf_counter() - begin


def _read(arguments: Sequence[str]) -> tuple[str, str]:
    """Return the name and the text of the one file that is given."""
    if len(arguments) != 1:
        raise click.UsageError(f"give one FILE, or - for stdin, not {len(arguments)}; --choices ranks continuations")
    file = str(FILE(arguments[0]))
    [source] = sources([file])
    return file, read_text(source)


def _prompt(ctx: click.Context, arguments: Sequence[str]) -> str:
    """Return the prompt before the choices; "-" is stdin, unless it stands after `--`."""
    if len(arguments) < 2:
        raise click.UsageError("--choices needs a PROMPT and at least one CHOICE")
    for each in arguments:
        TEXT.convert(each, None, ctx)
    is_literal = ctx.meta[LITERAL] == len(arguments)
    return join_stdin(arguments[:1], [arguments[0] == "-" and not is_literal])


def _refuse(ctx: click.Context, names: Sequence[str], why: str) -> None:
    for name in names:
        if is_typed(ctx, name):
            raise click.UsageError(f"--{name} {why}")


# --- what is printed -------------------------------------------------------------------------------------------------


def _table(score: Score, seconds: float) -> str:
    windows = score.windows
    layout = {"window": windows.window, "stride": windows.stride, "crops": windows.crops}
    rows = [
        (
            "convention",
            ", ".join([windows.convention, *(f"{name} {n}" for name, n in layout.items() if n is not None)]),
        ),
        ("tokens", f"{len(score.token_ids)}, {score.n_scored} scored"),
        ("words", str(score.n_words)),
        ("characters", str(score.n_characters)),
        ("bytes", str(score.n_bytes)),
        ("nats per token", _number(score.nats_per_token)),
        ("nats per character", _number(score.nats_per_character)),
        ("bits per byte", _number(score.bits_per_byte)),
        ("perplexity per token", _number(score.perplexity)),
        ("perplexity per word", _number(score.word_perplexity)),
        ("time", f"{seconds:.1f} s, {score.n_scored / seconds:.1f} tok/s"),
    ]
    return table(rows)


def _number(value: float | None) -> str:
    assert value is not None  # All models of the command have a tokenizer, and a scored text is not empty.
    return f"{value:.4f}" if value < 1e6 else f"{value:.4e}"


def _choices_table(ranked: Sequence[RankedChoice]) -> str:
    rows = [["choice", "tokens", "log-probability", "per token", "per byte"]]
    for each in ranked:
        assert each.logprob_per_byte is not None  # The choices are text.
        figures = (f"{figure:.4f}" for figure in (each.logprob, each.logprob_per_token, each.logprob_per_byte))
        rows.append([json.dumps(each.choice, ensure_ascii=False), str(len(each.token_ids)), *figures])
    return table(rows)


def _record(score: Score, seconds: float, model: Model) -> dict[str, Any]:
    return {
        **dataclasses.asdict(score.windows),
        **score_fields(score),
        "seconds": seconds,
        "tokens_per_second": score.n_scored / seconds,
        "per_token": _per_token(score.token_ids.tolist(), score.logprobs.tolist(), model),
    }


def _choices(ranked: Sequence[RankedChoice], model: Model) -> list[dict[str, Any]]:
    return [
        {**choice_fields(each), "per_token": _per_token(each.token_ids, each.logprobs.tolist(), model)}
        for each in ranked
    ]


def _per_token(ids: Sequence[int], logprobs: Sequence[float], model: Model) -> list[dict[str, Any]]:
    assert model.tokenizer is not None  # `load` always reads a tokenizer.
    return token_fields(ids, logprobs, model.tokenizer)


def _about(name: str, model: Model) -> dict[str, Any]:
    backend = model.backend
    return {"model": name, "backend": backend.name, "device": backend.device, "dtype": backend.dtype}
