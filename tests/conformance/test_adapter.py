"""The adapter of any namespace: which namespace it takes, and which names it knows."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

from gpt_xp.conformance.adapter import AS_IT_IS, WRAPPED, NamespaceBackend, check_known
from gpt_xp.conformance.checks import Checks
from gpt_xp.errors import BackendError

WRAPS_NUMPY = """
from array_api_compat.numpy import *
from array_api_compat.numpy import asarray, astype
def exp(x, /): raise RuntimeError("this exp is never called")
"""


@pytest.fixture
def wraps_numpy(tmp_path, monkeypatch):
    """The library has its own functions, and NumPy's arrays."""
    (tmp_path / "wraps_numpy.py").write_text(WRAPS_NUMPY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "wraps_numpy"
    sys.modules.pop("wraps_numpy", None)


def test_a_library_with_the_arrays_of_another_keeps_its_own_functions(wraps_numpy):
    backend = NamespaceBackend(wraps_numpy)
    assert (backend.used, backend.xp.__name__) == (AS_IT_IS, wraps_numpy)
    found = Checks(wraps_numpy, Path("no-model"), None, []).function("exp")
    assert found.message == "xp.exp(x): RuntimeError: this exp is never called"


def test_a_module_that_array_api_compat_wraps_is_taken_through_it():
    backend = NamespaceBackend("numpy")
    assert (backend.used, backend.xp.__name__) == (WRAPPED, "array_api_compat.numpy")


class EditableFinder:
    """A finder as editable installs have it: the source is outside of `sys.path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name != "editable_library":
            return None
        return importlib.util.spec_from_file_location(name, self.folder / "editable_library.py")


def test_an_editable_install_is_known_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "editable_library.py").write_text("raise RuntimeError\n")
    with pytest.raises(BackendError):
        check_known("editable_library")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, EditableFinder(tmp_path)])
    check_known("editable_library")
    check_known("editable_library.core")


def test_a_module_of_the_current_directory_is_known(tmp_path, monkeypatch):
    (tmp_path / "module_beside.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    check_known("module_beside")


@pytest.mark.parametrize("name", ["", ".core", "sys", "no_such_library", "no_such_library.core"])
def test_other_names_are_refused(name):
    with pytest.raises(BackendError, match="there is no module"):
        check_known(name)
