"""`gpt-xp generate`, or just `gpt-xp`: continue a prompt."""

import itertools
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from gpt_xp.cli import several
from gpt_xp.cli.batch import Batches, refuse_errors
from gpt_xp.cli.loading import load_model
from gpt_xp.cli.options import (
    CONTEXT,
    TEXT,
    hosts_option,
    loading_options,
    note_no_effect,
    output_options,
    sampling_options,
)
from gpt_xp.cli.output import is_terminal, note, progress_bar, show, waiting, write, write_json
from gpt_xp.cli.prompt_files import read_prompt_files
from gpt_xp.cli.prompts import PromptCommand, note_special_tokens, read_prompt
from gpt_xp.cli.report import add_stats, logprob_table, shared_fields, stats_line
from gpt_xp.cli.session import Session, check_settings
from gpt_xp.cli.wording import is_from_variable, is_typed
from gpt_xp.generation.results import Generation, Piece, Stats
from gpt_xp.reporting.records import continuation_fields
from gpt_xp.settings import GenerationSettings

LOADING_OPTIONS = (
    "model", "offline", "model_size", "models_dir",
    "backend", "device", "dtype", "quantize", "threads", "mesh", "hosts",
)  # fmt: skip
# click does not wrap the paragraphs after "\b", so that commands can be copied.
EPILOG = """\
Stdin is read where there is no PROMPT. A "-" stands for stdin, and joins it with PROMPT:

\b
  cat play.txt | gpt-xp - "TL;DR:"

After "--" everything is prompt. A variable can set an option: GPT_XP_MAX_TOKENS=100 is --max-tokens 100, and
GPT_XP_STOP holds a JSON list. picoGPT's --model_size and --models_dir work too. For completion in bash (zsh_source and
fish_source are for other shells):

\b
  eval "$(_GPT_XP_COMPLETE=bash_source gpt-xp)"
"""


@click.command(cls=PromptCommand, context_settings=CONTEXT, epilog=EPILOG)
@click.argument("words", metavar="[PROMPT]", nargs=-1, type=TEXT)
@loading_options
@hosts_option
@sampling_options
@output_options
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    words: Sequence[str],
    no_stream: bool,
    echo: bool,
    logprobs: bool,
    as_json: bool,
    stats: bool,
    json_full: bool,
    prompt_file: tuple[str, ...],
    strict: bool,
    batch_size: int,
    **settings: Any,
) -> None:
    """Continue PROMPT with GPT-2, and print the continuation and a newline."""
    loading = {name: settings.pop(name) for name in LOADING_OPTIONS}
    several.begin(ctx, loading)
    check_settings(settings)
    if words and is_from_variable(ctx, "prompt_file"):
        prompt_file = ()
    if prompt_file and words:
        raise click.UsageError("give PROMPT or --prompt-file, not both; several files each need a --prompt-file")
    lines = read_prompt_files(prompt_file, option_names(ctx.command)) if prompt_file else []
    if strict:
        refuse_errors(lines)
    prompt = "" if lines else read_prompt(ctx, words)
    draw_seed = settings["seed"] is None and settings["temperature"] > 0
    as_json = as_json or json_full
    note_options_without_effect(ctx, settings, in_json=as_json or bool(lines), from_file=bool(lines))
    name, model = load_model(**loading)
    if draw_seed:
        settings["seed"] = model.backend.agreed(secrets.randbits(32))
    session = Session(name, model, GenerationSettings(**settings))
    prompts = [line.prompt for line in lines if line.prompt is not None] or [prompt]
    note_special_tokens(session.model.tokenizer, prompts, settings["special_tokens"])
    if draw_seed and not as_json and not lines:
        note(f"seed {settings['seed']}")

    n_failed = 0
    if lines:
        batches = Batches(session, logprobs, json_full, strict)
        batches.run(lines, batch_size)
        all_stats, n_failed = batches.stats, batches.n_failed
    elif as_json:
        all_stats = print_json(session, prompt, logprobs)
    else:
        stream = is_terminal(sys.stdout) and not no_stream and settings["num_samples"] == 1
        results = (stream_text if stream else print_text)(session, prompt, prompt if echo else "")
        if logprobs:
            show("\n".join(logprob_table(session, result) for result in results).removesuffix("\n"))
        all_stats = [results[0].stats]
        note_full_context(session, results)
    if stats and all_stats:
        note(stats_line(session.name, add_stats(all_stats), session.model.backend.settings().get("packing")))
    if n_failed:
        note(f"{n_failed} of {len(lines)} prompts could not be continued: each has an `error` in its place")
        ctx.exit(1)


def option_names(command: click.Command) -> set[str]:
    """Return the names of the command's options, with underscores."""
    options = [each for each in command.params if isinstance(each, click.Option)]
    names = (name for each in options for name in each.opts if name.startswith("--"))
    return {name.removeprefix("--").replace("-", "_") for name in names}


def note_options_without_effect(ctx: click.Context, settings: dict[str, Any], in_json: bool, from_file: bool) -> None:
    """Write a line to stderr for options on the command line that have no effect together with the others."""
    if settings["temperature"] == 0:
        note_no_effect(ctx, ("top_k", "top_p", "min_p", "seed"), "without a temperature: add --temperature 1")
    if several.are_running():
        note_no_effect(ctx, ["speculate"], "with several processes")
    if in_json:
        note_no_effect(ctx, ("echo", "no_stream"), "on JSON")
    if not from_file:
        note_no_effect(ctx, ("batch_size", "strict"), "without --prompt-file")
    for stop in settings["stop"] if is_typed(ctx, "stop") else ():
        if found := re.search(r"\\[nrt]", stop):
            note(f"--stop '{stop}' holds a backslash and a letter; in bash and zsh, $'{found[0]}' is the character")


def note_full_context(session: Session, results: Sequence[Generation]) -> None:
    """Write a line to stderr where a continuation ended because the context was full."""
    full = [len(result.token_ids) for result in results if result.finish_reason == "context"]
    if full:
        asked = session.settings.max_tokens
        note(
            f"the context of {session.model.config.n_ctx} tokens is full: {max(full)} of {asked} tokens were generated"
        )


def stream_text(session: Session, prompt: str, start: str) -> list[Generation]:
    """Print `start` and the continuation while it is generated, and in any case a newline at the end."""
    pieces = await_first(session.stream(prompt))
    write(start)
    try:
        for piece in pieces:
            write(piece.text)
            if piece.result is not None:
                return [piece.result]
    finally:
        write("\n")
    raise AssertionError("the last piece has a result")


def print_text(session: Session, prompt: str, start: str) -> list[Generation]:
    """Print `start` and each sample when all are complete, or when Ctrl-C or an error ends them."""
    texts = [""] * session.settings.num_samples
    results: list[Generation] = []
    try:
        results = collect(session, prompt, texts)
    finally:
        if results or any(texts):
            write(layout([start + text for text in texts]))
    return results


def print_json(session: Session, prompt: str, logprobs: bool) -> list[Stats]:
    """Print a line of JSON for each sample."""
    results = collect(session, prompt, [""] * session.settings.num_samples)
    for sample, result in enumerate(results):
        write_json(
            {
                "type": "result",
                "prompt": prompt,
                **continuation_fields(sample, result, logprobs),
                **shared_fields(session, result),
            }
        )
    return [results[0].stats]


def collect(session: Session, prompt: str, texts: list[str]) -> list[Generation]:
    """Generate all samples with a progress bar, and return them; add their text to `texts` on the way."""
    results = []
    pieces = await_first(session.stream(prompt))
    with progress_bar(len(texts) * (session.settings.max_tokens or 0), "token") as bar:
        for piece in pieces:
            texts[piece.index] += piece.text
            if piece.result is None:
                bar.update()
            else:
                results.append(piece.result)
    return results


def await_first(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Return the same pieces when the first one is there, after the prompt is read and everything is compiled."""
    with waiting("reading the prompt"):
        first = next(pieces)
    return itertools.chain([first], pieces)


def layout(texts: Sequence[str]) -> str:
    """Return a single text as it is, and several texts each under a line with its number."""
    if len(texts) == 1:
        return f"{texts[0]}\n"
    return "".join(f"--- sample {number} ---\n{text}\n" for number, text in enumerate(texts, start=1))
