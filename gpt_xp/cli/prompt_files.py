"""Read the files of --prompt-file: each line is a prompt, or a JSON object with a prompt."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt_xp import json_text
from gpt_xp.cli.prompts import sources
from gpt_xp.errors import JsonError, JsonLimitError, PromptError
from gpt_xp.tokenizer.text_files import read_bytes
from gpt_xp.tree import finite


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompt file: its prompt, or the error in its place."""

    file: str  # as the user gave it; "-" is stdin
    number: int
    prompt: str | None = None
    input: dict[str, Any] | None = None  # the other fields of a JSON object; None for plain text
    error: str | None = None

    @property
    def place(self) -> str:
        """Return the place as messages show it: "prompts.txt, line 3"."""
        return f"{_name(self.file)}, line {self.number}"


def read_prompt_files(files: Sequence[str], options: Collection[str]) -> list[PromptLine]:
    """Return the lines of all files ("-": stdin) except empty lines.

    The lines of a file are JSON objects where its name ends in .jsonl or its first line is an object. Otherwise they
    are prompts. A line without a prompt has an `error`. Raises `TextError` for a file that cannot be read;
    `PromptError` for a file without prompts or in another form, and for a field with the name of one of the `options`.
    """
    each = (_read(file, read_bytes(source)) for file, source in zip(files, sources(files), strict=True))
    lines = [line for lines in each for line in lines]
    for line in lines:
        for field in line.input or ():
            if field.replace("-", "_") in options:
                raise PromptError(
                    f'{line.place}: "{field}" is the name of an option, and a line cannot set it: give the option to '
                    "the command, or rename the field"
                )
    return lines


def _read(file: str, data: bytes) -> list[PromptLine]:
    each = [(number, text) for number, text in enumerate(data.split(b"\n"), start=1) if text.strip()]
    if not each:
        raise PromptError(f"{_name(file)} holds no prompt: expected one a line")
    first = each[0][1].decode(errors="replace")
    if not _is_object(first) and (_is_json(data) or _is_spread(data)):
        raise PromptError(
            f'{_name(file)} holds JSON that is not in lines: expected an object with a text "prompt" on each line, as '
            "`jq -c` writes them"
        )
    is_json = file.endswith(".jsonl") or _is_object(first)
    lines = [_line(PromptLine(file, number), text.removesuffix(b"\r"), is_json) for number, text in each]
    for line in lines:
        if not is_json and line.prompt is not None and _is_object(line.prompt):
            raise PromptError(f"{line.place} is a JSON object, and the first line is not: make all of them objects")
    return lines


def _line(line: PromptLine, data: bytes, is_json: bool) -> PromptLine:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return replace(line, error=f"the line is not UTF-8 text: {error.reason} at byte {error.start}")
    if not is_json:
        return replace(line, prompt=text)
    try:
        value = json_text.parse(text, unique=True)
    except JsonError as error:
        return replace(line, error=f"the line is not valid JSON ({error}): {text:.60}")
    fields = value if isinstance(value, dict) else {}
    prompt = fields.pop("prompt", None)
    if not isinstance(prompt, str):
        return replace(line, input=finite(fields), error=f'expected a JSON object with a text "prompt", not {text:.60}')
    line = replace(line, prompt=prompt, input=finite(fields))
    if line.input != fields:  # Python reads NaN and infinity, which are not JSON.
        return replace(line, error="JSON has no NaN, no Infinity, and no number beyond 1e308")
    return line


def _is_object(text: str) -> bool:
    """Return whether a line is meant as a JSON object."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json_text.parse(text), dict)
    except JsonLimitError:
        return True
    except JsonError:
        return False


def _is_json(data: bytes) -> bool:
    """Return whether the whole file is one JSON list or object."""
    try:
        return isinstance(json_text.parse(data), dict | list)
    except JsonError:
        return False


def _is_spread(data: bytes) -> bool:
    """Return whether the file begins with a JSON object or list that spans several lines."""
    first = re.match(rb"\s*[\[{].*?^[\]}]", data, re.DOTALL | re.MULTILINE)
    return first is not None and _is_json(first[0])


def _name(file: str) -> str:
    return "stdin" if file == "-" else file
