"""Lets an experiment replace parts of the model without changing `transformer.py`.

Replacements are stored in the namespace `xp`, which every function takes. A backend compiles or captures a step for one
namespace, so a step with other parts is compiled separately.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from gpt_xp.errors import SettingError
from gpt_xp.types import Namespace

F = TypeVar("F", bound=Callable[..., Any])
NAMES: list[str] = []  # the names of all parts; `part` adds them


def replaced_parts(xp: Namespace) -> dict[str, Callable[..., Any]]:
    """Return the replacements in a namespace by the name of the part; most namespaces have none."""
    found: dict[str, Callable[..., Any]] = getattr(xp, "parts", {})
    return found


def changed_parts(xp: Namespace) -> frozenset[str]:
    """Return the names of the parts that an experiment has replaced, not a backend that computes the same faster."""
    return xp.changed if isinstance(xp, ReplacedParts) else frozenset()


def part(function: F) -> F:
    """Return the function as a part: a replacement in the namespace is called in its place."""
    name, place = function.__name__, [*inspect.signature(function).parameters].index("xp")
    NAMES.append(name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        xp: Any = args[place] if len(args) > place else kwargs.get("xp")
        replacement = replaced_parts(xp).get(name)
        if replacement is None:
            return function(*args, **kwargs)
        # The replacement may call the original part, so its namespace has this part unreplaced.
        return replacement(*args[:place], *args[place + 1 :], **kwargs | {"xp": xp.without(name)})

    return cast(F, call)


class ReplacedParts:
    """The namespace `xp`, in which parts of the model are replaced. Parts that `xp` replaces itself stay replaced.

    A backend says with `same_results` that its parts compute the same as those of `transformer.py`.
    """

    def __init__(self, xp: Namespace, parts: dict[str, Callable[..., Any]], same_results: bool = False) -> None:
        for name, function in parts.items():
            if name not in NAMES:
                raise SettingError(f"the model has no part {name!r}; its parts are: {', '.join(NAMES)}")
            if not callable(function):
                raise SettingError(f"the part {name} can be replaced by a function, not by {function!r:.80}")
        self._xp, self._own, self._same_results = xp, parts, same_results
        # Another namespace is not asked for `changed`: NumPy's would import a library to look for it.
        before = xp.changed if isinstance(xp, ReplacedParts) else frozenset()
        self.changed: frozenset[str] = before | (frozenset() if same_results else frozenset(parts))
        self.parts: dict[str, Callable[..., Any]] = {**xp.parts, **parts} if isinstance(xp, ReplacedParts) else parts
        self._without: dict[str, ReplacedParts] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        setattr(self, name, value)  # Later look-ups find the attribute without `__getattr__`.
        return value

    def without(self, name: str) -> "ReplacedParts":
        """Return the namespace with that part as it is in `xp`, or in `transformer.py` if `xp` itself replaces it."""
        if name not in self._without:
            rest = {each: part for each, part in self._own.items() if each != name}
            self._without[name] = ReplacedParts(
                self._xp if name in self._own else self._xp.without(name), rest, self._same_results
            )
        return self._without[name]
