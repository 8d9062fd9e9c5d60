"""The process in which a library is checked. It answers each line of JSON on stdin with one line on stdout.

The first request has the arguments of `Checks`; each other is {"do": a method of `Checks`, "with": its arguments}. The
answer is {"value": ...}, or {"problem": "in one line"} where the check itself could not be made.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from gpt_xp import json_text
from gpt_xp.processes import one_line, take_streams
from gpt_xp.tree import tree_map


def serve() -> None:
    """Answer requests until the end of stdin. Everything that the library prints goes to stderr."""
    warnings.simplefilter("ignore")  # The numbers are checked. Warnings of a library would hide its last words.
    requests, answers = take_streams()
    from gpt_xp.conformance.checks import Checks

    checks: Checks | None = None
    for line in requests:
        request = json_text.parse(line)
        try:
            if checks is None:
                checks = Checks(**request | {"folder": Path(request["folder"])})
                value = checks.describe()
            else:
                value = getattr(checks, request["do"])(**request["with"])
            answer = {"value": _as_json(value)}
        except Exception as error:  # Each library fails in its own way.
            answer = {"problem": one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _as_json(value: Any) -> Any:
    """Return records as dicts. Numbers that are not finite stay: Python reads back what it writes."""
    return tree_map(lambda leaf: dataclasses.asdict(leaf) if dataclasses.is_dataclass(leaf) else leaf, value)  # type: ignore[arg-type]
