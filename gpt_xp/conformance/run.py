"""Makes all checks of one library, one after the other, each within a limit of time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt_xp.comparison.figures import layer_names
from gpt_xp.config import GPT2Config
from gpt_xp.conformance.functions import ALONE, FUNCTIONS, NAMES, PROGRAMS
from gpt_xp.conformance.inputs import TIMEOUT, checked_inputs
from gpt_xp.conformance.process import CheckEnded, LibraryProcess
from gpt_xp.conformance.results import KINDS, Check, Conformance, Line

# After so many checks that hang, the others are left out, because each may take as long as the timeout.
MOST_HUNG = 3
NO_FORWARD_PASS = "it needs the forward pass, which fails"


def conform(
    module: str,
    model: str | Path | None = None,
    *,
    jit: str | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[str], object] = lambda stage: None,
) -> Conformance:
    """Check whether an array library can run GPT-2, and how exactly, and return a `Conformance`.

    `module` is an adapter's name ("jax") or a namespace of the array API standard ("dask.array"). `model` is as for
    `load`; None means the bundled one. `jit` names a function that compiles functions of the library's arrays
    ("jax.jit"). A check that takes longer than `timeout` seconds is ended. `progress(stage)` is called before each
    stage.

    Raises `BackendError` for a name that is neither an adapter's nor a module's, and `SettingError` for a `timeout`
    that is not positive, or longer than Python can wait. Raises the errors of `load` for the model, and `PromptError`
    for one whose context is too short. A library that cannot be loaded has a `problem` in its result.
    """
    inputs = checked_inputs(module, model, timeout)
    with LibraryProcess(module, inputs.folder, jit, timeout) as library:
        progress("loading")
        try:
            about = library.start()
        except CheckEnded as ended:
            return Conformance(module, inputs.name, problem=str(ended))
        run = _Run(library, inputs.config, progress)
        run.all(with_jit=jit is not None)
        checks = sorted(run.checks, key=lambda check: KINDS.index(check.kind))
        return Conformance(module, inputs.name, **about, replaced=run.replaced, checks=tuple(checks))


def check_names(
    module: str, model: str | Path | None = None, jit: str | None = None, timeout: float = TIMEOUT
) -> list[str]:
    """Return the names of the checks that `conform` makes, and raise its errors. Nothing of the library is imported."""
    config = checked_inputs(module, model, timeout).config
    names = [*FUNCTIONS, *PROGRAMS, *layer_names(config.n_layer), "logits", "text", "speed"]
    return [*names, *(["jit"] if jit else [])]


class _Run:
    """The checks of one library in their order."""

    def __init__(self, library: LibraryProcess, config: GPT2Config, progress: Callable[[str], object]) -> None:
        self._library, self._config, self._progress = library, config, progress
        self._hung = 0
        self.checks: list[Check] = []
        self.replaced: tuple[str, ...] = ()

    def all(self, with_jit: bool) -> None:
        """Make every check. A check that needs a program that fails is not made."""
        self._functions()
        runs = self._programs()
        if with_jit:
            self._progress("jit")
            self._add(["jit"], "jit", "jit", None if runs["forward pass"] else NO_FORWARD_PASS)
        if not runs["forward pass"] and (failing := self._failing_functions()):
            self._replace(failing, runs)
        why_not = None if runs["forward pass"] else NO_FORWARD_PASS
        with_cache = runs["cache"]
        self._progress("layers")
        layers = [*layer_names(self._config.n_layer), "logits"]
        self._add(layers, "layer", "layers", why_not, with_cache=with_cache)
        self._progress("text")
        self._add(["text"], "text", "text", why_not, with_cache=with_cache)
        self._progress("speed")
        if self.replaced:
            why_not = "NumPy computes a part of it"
        elif not with_cache:
            why_not = why_not or "it needs the cache, which fails"
        self._add(["speed"], "speed", "speed", why_not)

    def _functions(self) -> None:
        self._progress("functions")
        for name, use in FUNCTIONS.items():
            self._add([name], "function", "function", needed_for=use.needed_for, name=name)

    def _programs(self) -> dict[str, bool]:
        """Run every program, and return whether each came to its end."""
        runs: dict[str, bool] = {}
        for name in PROGRAMS:
            self._progress(name)
            why_not = None if name in ALONE or runs["forward pass"] else NO_FORWARD_PASS
            runs[name] = _ran(self._add([name], "program", "program", why_not, name=name))
        return runs

    def _failing_functions(self) -> list[str]:
        # A function that was not checked may be right, and stays the library's.
        return [check.name for check in self.checks if check.name in NAMES and check.is_ok is False]

    def _replace(self, names: list[str], runs: dict[str, bool]) -> None:
        """Let NumPy compute the functions that fail, so that what needs the forward pass can be checked after all."""
        self._progress(f"NumPy in place of {', '.join(names)}")
        self._library.replace(names)
        self._hung = 0
        runs["forward pass"] = _ran(list(self._make(["forward pass"], "program", "program", name="forward pass")))
        if not runs["forward pass"]:
            return
        self.replaced = tuple(names)
        for index, check in enumerate(self.checks):
            if check.kind == "program" and check.is_ok is None and check.name not in ALONE:
                [self.checks[index]] = self._make([check.name], "program", "program", name=check.name)
                runs[check.name] = _ran([self.checks[index]])

    def _add(self, *args: Any, **kwargs: Any) -> list[Check]:
        """Make checks as `_make` does, keep them, and return them."""
        made = list(self._make(*args, **kwargs))
        self.checks += made
        return made

    def _make(
        self,
        names: list[str],
        kind: str,
        do: str,
        why_not: str | None = None,
        needed_for: tuple[str, ...] = (),
        **arguments: Any,
    ) -> Iterator[Check]:
        """Ask the library's process for the checks called `names`, which one request makes."""
        if why_not:
            yield from (Check(name, kind, None, why_not) for name in names)
        elif self._hung == MOST_HUNG:
            yield from (Check(name, kind, None, f"{MOST_HUNG} checks before it took too long") for name in names)
        else:
            try:
                found = self._library.check(do, **arguments)
                yield from (_check(**each) for each in (found if isinstance(found, list) else [found]))
            except CheckEnded as ended:
                self._hung += ended.hung
                yield from (Check(name, kind, False, str(ended), needed_for) for name in names)


def _ran(checks: list[Check]) -> bool:
    """Return whether a program came to its end, right or wrong."""
    return "ran" in checks[0].figures


def _check(line: dict[str, Any] | None, needed_for: list[str], **rest: Any) -> Check:
    """Return a check from the JSON of the library's process."""
    return Check(**rest, line=Line(**line) if line else None, needed_for=tuple(needed_for))
