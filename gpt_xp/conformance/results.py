"""The records of a conformance check."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gpt_xp.tree import finite

# The checks are listed in this order of their kinds.
KINDS = ("function", "program", "layer", "text", "speed", "jit")


@dataclass(frozen=True)
class Line:
    """A line of gpt-xp's source, and the arrays that it names, with dtype and shape."""

    file: str
    number: int
    function: str
    code: str
    arrays: str


@dataclass(frozen=True)
class Check:
    """One check: its name ("take", "forward pass", "block 0", "text", ...), its kind, and what came of it.

    `is_ok` is True, False, or None if it was not made. `message` says what is wrong, or why it was not made. A failing
    function is needed for the programs in `needed_for`. `line` is where a program fails. `relative` and `allowed` are
    the error and its limit, divided by the largest number. `figures` holds the other numbers of a check.
    """

    name: str
    kind: str
    is_ok: bool | None
    message: str = ""
    needed_for: tuple[str, ...] = ()
    line: Line | None = None
    relative: float | None = None
    allowed: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conformance:
    """The result of all checks of one library.

    `used` tells which namespace was checked: that of an adapter, that of array-api-compat, or the module's own.
    `problem` says why nothing could be checked, and is None otherwise. Where the forward pass fails, `replaced` are the
    failing functions that NumPy computed, so that the cache, the loss, the layers and the text could be checked.
    """

    module: str
    model: str
    version: str | None = None
    used: str | None = None
    device: str | None = None
    problem: str | None = None
    replaced: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def is_ok(self) -> bool:
        """True if every check was made, and all are inside the tolerance."""
        return self.problem is None and all(check.is_ok for check in self.checks)

    def of(self, kind: str) -> tuple[Check, ...]:
        """Return the checks of one of `KINDS`."""
        return tuple(check for check in self.checks if check.kind == kind)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold; numbers that are not finite become None."""
        as_json: dict[str, Any] = finite({**dataclasses.asdict(self), "is_ok": self.is_ok})
        return as_json
