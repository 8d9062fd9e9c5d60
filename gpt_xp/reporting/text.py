"""Text for people: sizes, tables, lists of names, lines that are wrapped."""

import difflib
import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

COMMAND = re.compile(r"`[^`]+`|pip install (-\S+ )*('[^']+'|\S+)")


def size(n_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it; 1 kB is 1000 bytes."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.{digits}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return lines with aligned columns, the last of which is not padded."""
    return "".join(table_lines(rows))


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the line of each row of a `table`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return [line + "\n" for line in lines]


def spelled(data: bytes) -> str:
    """Return the bytes of a token as quoted text, or in hex where they are not whole characters."""
    try:
        return json.dumps(data.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return f"<{data.hex(' ')}>"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def wrapped(text: str) -> str:
    """Return lines of at most 80 columns, all but the first indented; a command to copy stays on one line."""
    whole = COMMAND.sub(lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ") + "\n"


def closest_first(word: str, known: Iterable[str]) -> list[str]:
    """Return `known` with the names that a mistyped `word` most likely means first."""

    names = list(known)
    close = difflib.get_close_matches(word, names, n=len(names), cutoff=0.5)
    return close + [name for name in names if name not in close]


def listed(values: Any) -> list[Any]:
    """Return a list of values; one name, number or path by itself is a list of one."""
    return [values] if isinstance(values, str | int | os.PathLike) else list(values)


def short_dtypes(text: str) -> str:
    """Return text with f32 for float32, and bf16 for bfloat16."""
    return text.replace("bfloat", "bf").replace("float", "f")
