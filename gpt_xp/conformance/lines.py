"""Finds the line of gpt-xp's mathematics at which an error of a library arose."""

import re
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import gpt_xp
from gpt_xp.conformance.results import Line

ROOT = Path(gpt_xp.__file__).parent

# These files compute with arrays. The others, such as decoder.py, only call them. A lazy library fails in those later
# than where the mistake is, and a line of them would say nothing about it.
MATHEMATICS = frozenset(
    ROOT / name
    for name in (
        "transformer.py", "kv_cache.py", "arrays.py", "quantization.py",
        "generation/sampling.py", "generation/step_functions.py",
    )
)  # fmt: skip


def failing_line(error: BaseException) -> Line | None:
    """Return the innermost line of gpt-xp's mathematics in the traceback of an error, or None if there is none."""
    found: Line | None = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path in MATHEMATICS:
            summary = traceback.FrameSummary(str(path), number, frame.f_code.co_name)
            code = (summary.line or "").partition("  # ")[0].strip()
            found = Line(path.name, number, frame.f_code.co_name, code, _arrays(code, frame))
    return found


def _arrays(code: str, frame: FrameType) -> str:
    """Return dtype and shape of each array that the line names: "x float32 [6, 4], w float32 [4, 12]"."""
    names = dict.fromkeys(re.findall(r"(?<![\w.])[a-z]\w*(?![\w(])", code))
    values = ((name, frame.f_locals[name]) for name in names if name in frame.f_locals)
    return ", ".join(f"{name} {text}" for name, value in values if (text := describe(value)))


def describe(value: Any) -> str:
    """Return dtype and shape of an array, or "" for a value that is none."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        return ""
    dtype = str(value.dtype).rpartition(".")[2].strip("'<>\" ")
    return f"{dtype} {list(value.shape)}"
