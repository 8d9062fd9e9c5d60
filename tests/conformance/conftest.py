"""Wrong libraries: array-api-strict with one change, as a module that Python can import."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import lazy_namespace
import pytest
from libraries import skipping_what_is_missing
from third_party import installed

from gpt_xp.conformance.checks import Checks
from gpt_xp.hub.find import find_model

STRICT = "from array_api_strict import *\n__version__ = '0.1'\n"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that makes a module of array-api-strict with a change, and returns its name."""
    with skipping_what_is_missing("array-api-strict"):
        import array_api_strict  # noqa: F401

    def make(change: str) -> str:
        (tmp_path / "planted_library.py").write_text(STRICT + change)
        return "planted_library"

    monkeypatch.syspath_prepend(tmp_path)
    for name, value in installed(tmp_path, Path(lazy_namespace.__file__).parent).items():
        monkeypatch.setenv(name, value)
    return make


@pytest.fixture
def checks_of(library, monkeypatch) -> Callable[[str], Checks]:
    """Return a function that makes the checks of such a module in this process, which is faster."""

    def make(change: str) -> Checks:
        name = library(change)
        importlib.invalidate_caches()
        # It makes monkeypatch take the module out of `sys.modules` after the test.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
        return Checks(name, find_model("shakespeare"), None, [])

    return make
