"""Read the files of --prompt-file: each line is a prompt, or a JSON object with a prompt."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt_xp.cli.prompts import sources
from gpt_xp.errors import PromptError
from gpt_xp.prompt_lines import holds_objects, is_object, parse_line
from gpt_xp.tokenizer.text_files import read_bytes


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
    is_json = holds_objects(_name(file), data)
    each = [(number, text) for number, text in enumerate(data.split(b"\n"), start=1) if text.strip()]
    lines = [_line(PromptLine(file, number), text.removesuffix(b"\r"), is_json) for number, text in each]
    for line in lines:
        if not is_json and line.prompt is not None and is_object(line.prompt):
            raise PromptError(f"{line.place} is a JSON object, and the first line is not: make all of them objects")
    return lines


def _line(line: PromptLine, data: bytes, is_json: bool) -> PromptLine:
    content = parse_line(data, is_json)
    return replace(line, prompt=content.text, input=content.input, error=content.error)


def _name(file: str) -> str:
    return "stdin" if file == "-" else file
