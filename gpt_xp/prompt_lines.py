"""Parse the lines of files of prompts: each is a prompt, or a JSON object with a prompt."""

import re
from dataclasses import dataclass, replace
from typing import Any

from gpt_xp import json_text
from gpt_xp.errors import JsonError, JsonLimitError, PromptError
from gpt_xp.tree import finite

AN_OBJECT = "expected an object with a text %s on each line, as `jq -c` writes them"


@dataclass(frozen=True)
class LineContent:
    """The content of a line: its text, or an error; `input` has the other fields of a JSON object."""

    text: str | None = None
    input: dict[str, Any] | None = None  # None for plain text
    choices: list[str] | None = None  # only where they were asked for
    error: str | None = None


def parse_line(data: bytes, is_json: bool, names: tuple[str, ...] = ("prompt",), choices: bool = False) -> LineContent:
    """Return the content of a line, which may have an `error`.

    The text of a JSON object is its first field of `names`. With `choices`, the field of that name must be a list of
    texts.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return LineContent(error=f"the line is not UTF-8 text: {error.reason} at byte {error.start}")
    if not is_json:
        return LineContent(text)
    try:
        value = json_text.parse(text, unique=True)
    except JsonError as error:
        return LineContent(error=f"the line is not valid JSON ({error}): {text:.60}")
    fields = value if isinstance(value, dict) else {}
    prompt = fields.pop(next((name for name in names if name in fields), names[0]), None)
    if not isinstance(prompt, str):
        problem = f"expected a JSON object with a text {_quoted(names)}, not {text:.60}"
        return LineContent(input=finite(fields), error=problem)
    content = LineContent(prompt, choices=fields.pop("choices", None) if choices else None)
    content = replace(content, input=finite(fields))
    if choices and not _are_texts(content.choices):
        problem = f'expected "choices", a list of texts that are not empty, not {content.choices!r:.60}'
        return replace(content, choices=None, error=problem)
    # Python reads NaN and infinity, which are not JSON.
    problem = "" if content.input == fields else "JSON has no NaN, no Infinity, and no number beyond 1e308"
    return replace(content, error=problem or None)


def _are_texts(choices: Any) -> bool:
    """Return whether this is a list of texts, none of them empty."""
    return isinstance(choices, list) and bool(choices) and all(isinstance(each, str) and each for each in choices)


def holds_objects(name: str, data: bytes, is_whole: bool = True, names: tuple[str, ...] = ("prompt",)) -> bool:
    """Return whether the lines of a file are JSON objects; False means that each is a text.

    They are objects where the `name` ends in .jsonl or the first line is one. `data` is the file, or its beginning if
    `is_whole` is false. Raises `PromptError` for a file without lines, and for JSON that is not in lines.
    """
    first = next((line for line in data.split(b"\n") if line.strip()), None)
    if first is None:
        raise PromptError(f"{name} holds no prompt: expected one a line")
    starts_with_object = is_object(first.decode(errors="replace"))
    if not starts_with_object and ((is_whole and _is_json(data)) or _is_spread(data)):
        raise PromptError(f"{name} holds JSON that is not in lines: {AN_OBJECT % _quoted(names)}")
    return name.endswith(".jsonl") or starts_with_object


def is_object(text: str) -> bool:
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


def _quoted(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)
