"""Finds the line of gpt-xp's mathematics at which an error of a library arose."""

import re
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import gpt_xp
from gpt_xp.conformance.results import Line

ROOT = Path(gpt_xp.__file__).parent


def failing_line(error: BaseException) -> Line | None:
    """Return the innermost line of gpt-xp's mathematics in the traceback of an error, or None if there is none."""
    found: Line | None = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if _is_mathematics(path):
            summary = traceback.FrameSummary(str(path), number, frame.f_code.co_name)
            code = (summary.line or "").partition("  # ")[0].strip()
            found = Line(path.name, number, frame.f_code.co_name, code, _arrays(code, frame))
    return found


def _is_mathematics(path: Path) -> bool:
    """Return whether this file has a part of the forward pass, of the cache, or of the choice of a token."""
    return path.parent in (ROOT, ROOT / "generation") and path.name != "parts.py"


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
