"""Write the result of conformance checks as text for a terminal, or as rows of a Markdown table."""

import math
import re
from collections.abc import Callable, Iterator, Sequence

from gpt_xp.conformance.functions import ALONE, PROGRAMS
from gpt_xp.conformance.results import Check, Conformance, Line
from gpt_xp.reporting.text import markdown_table, table, wrapped

HEAD = (
    "library", "version", "namespace", "functions", "programs", "worst layer, of the allowed error", "logits", "text",
    "tokens/s (NumPy)",
)  # fmt: skip


def as_text(found: Conformance) -> str:
    """Return the report of one library for a terminal of 80 columns."""
    if found.problem:
        return wrapped(f"{found.module}: FAILED: {found.problem}")
    # The checks of these programs come before the line that announces NumPy's help, because they are made without it.
    alone = ALONE if found.replaced else PROGRAMS
    parts = [
        wrapped(f"{found.module} {found.version}, {found.used}; model {found.model}, float32"),
        _functions(found.of("function")),
        "".join(_line(check) for check in found.of("program") if check.name in alone),
        _replaced(found),
        "".join(_line(check) for check in found.of("program") if check.name not in alone),
        _layers(found.of("layer")),
        "".join(_line(check) for kind in ("text", "speed", "jit") for check in found.of(kind)),
        verdict(found),
    ]
    return "\n".join(part for part in parts if part)


def verdict(found: Conformance) -> str:
    """Return the last line: inside the tolerance, or which checks are not."""
    if found.problem:
        return wrapped(f"{found.module}: FAILED: {found.problem}")
    if found.is_ok:
        return f"{found.module}: inside the tolerance\n"
    wrong = [check.name for check in found.checks if check.is_ok is False]
    left_out = [check.name for check in found.checks if check.is_ok is None]
    more = f"; not checked: {', '.join(left_out)}" if left_out else ""
    return wrapped(f"{found.module}: OUTSIDE: {', '.join(wrong)}{more}")


def as_markdown(results: Sequence[Conformance]) -> str:
    """Return a Markdown table with a row for each library."""
    with_jit = any(found.of("jit") for found in results)
    rows = [_row(found) + ([_short(found, "jit")] if with_jit else []) for found in results]
    return markdown_table([[*HEAD, *(["traced"] if with_jit else [])], *rows])


def explained(check: Check) -> str:
    """Return what came of a check, with the line of gpt-xp at which an error arose."""
    if check.is_ok is None:
        return f"not checked: {check.message}"
    if check.is_ok:
        return _figures(check) or "ok"
    costs = f" (needed for: {', '.join(check.needed_for)})" if check.needed_for else ""
    at = f"at {_place(check.line)}: " if check.line else ""
    return f"FAILED {at}{check.message}{costs}"


def _place(line: Line) -> str:
    arrays = f", where {line.arrays}" if line.arrays else ""
    return f"{line.file}:{line.number}, in {line.function}: `{line.code}`{arrays}"


def _figures(check: Check) -> str:
    figures = check.figures
    if check.kind == "text":
        same = f"the same {figures['tokens']} tokens"
        return check.message or same + ("" if figures["with_cache"] else ", computed without a cache")
    if check.kind == "speed":
        return f"{figures['tokens_per_second']:.3g} tokens/s; NumPy: {figures['numpy_tokens_per_second']:.3g}"
    if check.relative is not None:
        return f"{check.relative:.1e}"
    return "traced, with the same logits" if check.kind == "jit" else ""


def _line(check: Check) -> str:
    return wrapped(f"{check.name}: {explained(check)}")


def _functions(checks: Sequence[Check]) -> str:
    fine = sum(check.is_ok is True for check in checks)
    lines = [_line(check) for check in checks if not check.is_ok]
    return f"functions: {fine} of {len(checks)} as GPT-2 calls them\n" + "".join(lines)


def _replaced(found: Conformance) -> str:
    if not found.replaced:
        return ""
    return wrapped(f"From here on, NumPy computes the functions that fail ({', '.join(found.replaced)}).")


def _layers(checks: Sequence[Check]) -> str:
    """Return the error of each layer, or one line where they have one and the same reason to fail."""
    if not any(check.figures.get("computed") for check in checks):
        return wrapped(f"layers: {explained(checks[0])}")
    return table([("layer", "of the largest", "allowed", ""), *_layer_rows(checks)])


def _layer_rows(checks: Sequence[Check]) -> Iterator[tuple[str, ...]]:
    for check in checks:
        assert check.allowed is not None
        yield check.name, _relative(check), f"{check.allowed:.1e}", "" if check.is_ok else "OUTSIDE"


def _row(found: Conformance) -> list[str]:
    if found.problem:
        return [f"`{found.module}`", "-", "-", _cell(found.problem.partition(": ")[0]), *["-"] * (len(HEAD) - 4)]
    functions, programs = found.of("function"), found.of("program")
    fine = sum(check.is_ok is True for check in functions)
    return [
        f"`{found.module}`", str(found.version), _cell(str(found.used)),
        "; ".join([f"{fine} of {len(functions)}", *_others(functions, lambda check: f"`{check.name}`")]),
        "; ".join(_others(programs, _program) or ["all"]), *_errors(found),
        _short(found, "text"), _short(found, "speed"),
    ]  # fmt: skip


def _others(checks: Sequence[Check], name: Callable[[Check], str]) -> list[str]:
    """Return which checks fail, and which were not made."""
    parts = []
    for is_ok, intro in ((False, "not "), (None, "not checked: ")):
        if names := [name(check) for check in checks if check.is_ok is is_ok]:
            parts.append(intro + ", ".join(names))
    return parts


def _program(check: Check) -> str:
    """Return the name of a program, and the line in which it fails."""
    return check.name + (f" (`{check.line.file}:{check.line.number}`)" if check.line else "")


def _errors(found: Conformance) -> tuple[str, str]:
    """Return the layer that comes closest to its allowed error, or goes furthest beyond it, and the logits' error."""
    *layers, logits = found.of("layer")
    if logits.is_ok is None:
        return "-", "-"
    if not logits.figures.get("computed"):
        return _cell(logits.message), "-"
    shares = {check.name: _share(check) for check in layers}
    worst = max(shares, key=lambda name: shares[name])
    helped = ", with NumPy" if found.replaced else ""
    return f"{worst}: {shares[worst]:.2g}{helped}", _relative(logits)


def _share(check: Check) -> float:
    return math.inf if check.relative is None else check.relative / (check.allowed or 1)


def _relative(check: Check) -> str:
    return "not finite" if check.relative is None or not math.isfinite(check.relative) else f"{check.relative:.1e}"


def _short(found: Conformance, kind: str) -> str:
    """Return the cell of the text, of the speed, or of the compiler."""
    for check in found.of(kind):
        figures = check.figures
        if check.is_ok is None:
            return "-"
        if kind == "speed" and check.is_ok:
            return f"{figures['tokens_per_second']:.3g} ({figures['numpy_tokens_per_second']:.3g})"
        if kind == "text" and figures:
            return f"{figures['shared']} of {figures['tokens']} tokens"
        return "yes" if check.is_ok else _cell(check.message)
    return "-"


def _cell(text: str) -> str:
    """Return text that fits one cell of a table, and in which a name such as __array__ stays what it is."""
    return re.sub(r"(\w*__\w+)", r"`\1`", text.replace("|", "\\|").replace("\n", " "))
