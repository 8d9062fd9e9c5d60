"""A plugin for pytest: `pytest --pyargs gpt_xp.conformance --gpt-xp-backend mlx.core`.

Each check is an item. Without the option, the plugin adds no item and imports nothing of gpt-xp but its own names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOADING = "loading"  # the first item: the library is imported
HERE = Path(__file__).with_name("__init__.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("gpt-xp", "gpt-xp: GPT-2 on an array library")
    group.addoption("--gpt-xp-backend", metavar="MODULE", help="check this namespace, such as mlx.core")
    group.addoption("--gpt-xp-model", metavar="MODEL", help="a model's name or directory (default: the bundled one)")
    group.addoption("--gpt-xp-jit", metavar="FUNCTION", help="trace the forward pass with it, such as jax.jit")
    group.addoption("--gpt-xp-timeout", metavar="SECONDS", type=float, default=120.0, help="end longer checks (120)")


def pytest_configure(config: pytest.Config) -> None:
    """Collect the checks if a library was named."""
    if config.getoption("--gpt-xp-backend"):
        config.pluginmanager.register(_Collecting(), "gpt-xp-conformance")


class _Collecting:
    """Makes items of the package `gpt_xp.conformance` alone."""

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path != HERE:
            return None
        return _Library.from_parent(parent, path=file_path, nodeid="gpt_xp")


class _Library(pytest.File):
    """One library. Its checks are made at the first item that runs."""

    _found: Any = None

    def collect(self) -> Iterator[pytest.Item]:
        from gpt_xp.conformance.run import check_names
        from gpt_xp.errors import GptXpError

        option = self.config.getoption
        try:
            names = check_names(
                option("--gpt-xp-backend"), option("--gpt-xp-model"), option("--gpt-xp-jit"),
                option("--gpt-xp-timeout"),
            )  # fmt: skip
        except GptXpError as error:
            raise self.CollectError(str(error)) from None
        for name in (LOADING, *names):
            yield _Item.from_parent(self, name=name)

    def found(self) -> Any:
        """Return the `Conformance` of the library."""
        from gpt_xp.conformance.run import conform

        if self._found is None:
            option = self.config.getoption
            self._found = conform(
                option("--gpt-xp-backend"), option("--gpt-xp-model"), jit=option("--gpt-xp-jit"),
                timeout=option("--gpt-xp-timeout"),
            )  # fmt: skip
        return self._found


class _Item(pytest.Item):
    """One check. A check that another failure prevents is skipped."""

    parent: _Library

    def runtest(self) -> None:
        from gpt_xp.conformance.report import explained

        found = self.parent.found()
        if self.name == LOADING:
            if found.problem:
                pytest.fail(found.problem, pytrace=False)
            return
        if found.problem:
            pytest.skip("the library cannot be loaded")
        check = next(check for check in found.checks if check.name == self.name)
        text = explained(check)
        if check.is_ok is None:
            pytest.skip(text)
        if not check.is_ok:
            pytest.fail(text.removeprefix("FAILED "), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"gpt_xp::{self.name}"
