"""`gpt-xp --prompt-file`: continue many prompts, some at a time, and print JSON lines."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gpt_xp.cli.output import progress, write_json
from gpt_xp.cli.report import record
from gpt_xp.cli.session import Session
from gpt_xp.errors import GptXpError, PromptError
from gpt_xp.results import Stats


class Line(NamedTuple):
    """A prompt, and where it stands: "prompts.txt, line 3"."""

    prompt: str
    number: int
    place: str


def read_prompt_file(file: str) -> list[Line]:
    """Return the prompts of `file` ("-": stdin), one a line, or the field `prompt` of JSON lines.

    They are JSON lines if the name ends in .jsonl or the first line is a JSON object. Empty lines are left out.
    Raises `PromptError`, with the line's number, for what is not UTF-8 or not such an object.
    """
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    name = "stdin" if file == "-" else file
    lines = [
        Line(_decode(line, place), number, place)
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip() and (place := f"{name}, line {number}")
    ]
    if not lines:
        raise PromptError(f"{name} holds no prompt: expected one a line")
    if file.endswith(".jsonl") or isinstance(_parse(lines[0].prompt), dict):
        return [line._replace(prompt=_prompt_field(line)) for line in lines]
    for line in lines:
        if isinstance(_parse(line.prompt), dict):
            raise PromptError(f"{line.place} is a JSON object, and the first line is not: make all of them objects")
    return lines


def continue_lines(session: Session, lines: list[Line], batch_size: int, logprobs: bool) -> list[Stats]:
    """Print a line of JSON for each sample of each prompt, in order; return the statistics of each batch."""
    check(session, lines)
    all_stats = []
    n_samples = session.settings["num_samples"]
    with progress(len(lines), "prompt") as bar:
        for begin in range(0, len(lines), batch_size):
            batch = lines[begin : begin + batch_size]
            results = session.generate([line.prompt for line in batch])
            for row, result in enumerate(results):
                line, sample = batch[row // n_samples], row % n_samples
                write_json({"line": line.number, **record(session, line.prompt, sample, result, logprobs)})
            all_stats.append(results[0].stats)
            bar.update(len(batch))
    return all_stats


def check(session: Session, lines: list[Line]) -> None:
    """Raise the error of the first prompt that cannot be continued, before any work is done that could be lost."""
    for line in lines:
        try:
            session.stream(line.prompt)  # checks at once, and generates only when it is iterated
        except GptXpError as error:
            raise type(error)(f"{line.place}: {error}") from None


def _decode(line: bytes, place: str) -> str:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{place} is not UTF-8 text: {error.reason} at byte {error.start} of the line") from None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _prompt_field(line: Line) -> str:
    value = _parse(line.prompt)
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise PromptError(f'{line.place}: expected a JSON object with a text "prompt", not {line.prompt[:60]}')
    return prompt
