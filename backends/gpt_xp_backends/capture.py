"""Capturing a step, on any library: an array that stands for another, and when to stop capturing.

A step that is captured computes on arrays that have no numbers of their own. Where it asks for numbers, or for a
function that they lack, it cannot be captured, and is computed as it stands.
"""

import warnings
from typing import Any, NoReturn


class StandIn:
    """An array of a step that is being captured: asked for its numbers it raises `TypeError`, and never lies."""

    __slots__ = ()
    __array_ufunc__ = None  # NumPy and CuPy leave `array + lazy` to the lazy one, and np.tanh(lazy) fails

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError(
            "this array stands for one of a step that is captured, and has no numbers: GPT_XP_CUPY_GRAPH=0 has every "
            "step computed as it stands"
        )

    __array__ = __bool__ = __eq__ = __ne__ = _refuse  # Python's own would answer something
    __hash__ = object.__hash__


class Trust:
    """Whether steps are captured, for all functions of a backend; `problem` says why they are not.

    `consequence` and `switch` are for the warning: what happens then, and the setting that does not try.
    """

    def __init__(self, problem: str | None, consequence: str, switch: str) -> None:
        self.problem = problem
        self.agreed: set[Any] = set()  # kinds of graphs whose logits were right
        self._consequence, self._switch = consequence, switch

    @property
    def verdict(self) -> str:
        """Return "yes" once a graph was right, "no" with the reason, or "not yet"."""
        return f"no ({self.problem})" if self.problem else "yes" if self.agreed else "not yet"

    def lose(self, problem: str, error: Exception | None = None) -> None:
        """Capture and replay no more. The warning has the error as its cause, with the traceback."""
        self.problem = problem = problem.partition("\n")[0]  # a compiler has more to say
        warning = RuntimeWarning(f"{self._consequence}: {problem} ({self._switch} does not try)")
        warning.__cause__ = error
        warnings.warn(warning, stacklevel=2)
