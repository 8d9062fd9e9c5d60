"""The command `conform`: what it prints, where, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_xp.cli.conform import conform as command
from gpt_xp.conformance import inputs
from gpt_xp.conformance.results import Check, Conformance

pytestmark = pytest.mark.usefixtures("no_variables")

RIGHT = Conformance("numpy", "shakespeare", "2", "as it is", "cpu", checks=(Check("take", "function", True),))
WRONG = Conformance("mine", "shakespeare", problem="mine cannot be imported: no driver")


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks have been made."""

    def found(module: str, *args: object, progress: object, **options: object) -> Conformance:
        progress("loading")  # type: ignore[operator]
        return RIGHT if module == "numpy" else WRONG

    monkeypatch.setattr("gpt_xp.conformance.run.conform", found)
    monkeypatch.setattr("gpt_xp.conformance.adapter.check_known", lambda module: None)


def test_the_command_checks_a_library(call):
    result = call("conform", "numpy")
    assert result.code == 0, result.out
    assert result.out.startswith("numpy ")
    assert result.out.endswith("numpy: inside the tolerance\n")
    assert result.err.splitlines()[0] == "gpt-xp: numpy: loading"
    assert "gpt-xp: numpy: layers" in result.err


@pytest.mark.usefixtures("shows")
def test_json_is_one_object_and_the_code_is_that_of_the_worst(call):
    result = call("conform", "numpy", "mine", "--json")
    assert result.code == 1
    record = json.loads(result.out)
    assert record["schema"] == 2
    assert [each["module"] for each in record["libraries"]] == ["numpy", "mine"]
    assert [each["is_ok"] for each in record["libraries"]] == [True, False]
    assert record["is_ok"] is False
    assert call("conform", "numpy", "--json").code == 0


def test_wrong_usage(call):
    assert call("conform").code == 2
    assert "Missing argument" in call("conform").err
    assert call("conform", "numpy", "--timeout", "0").code == 2
    several = call("conform", "numpy", "jax", "--jit", "jax.jit")
    assert several.code == 2
    assert "--jit names a function of one library" in several.err


def test_files_of_the_current_directory_hide_no_module(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('this file of the user was run')")
    script = str(Path(sys.executable).with_name("gpt-xp"))
    done = subprocess.run([script, "conform", "numpy"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "numpy: inside the tolerance" in done.stdout


def test_an_unknown_module_is_one_clear_error(call):
    result = call("conform", "numpy", "no_such_library")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("gpt-xp: error: there is no module 'no_such_library' here, and no adapter")
    assert len(result.err.splitlines()) == 1


def test_the_defaults_are_those_of_the_library():
    assert {each.name: each.default for each in command.params if each.name in ("timeout", "model")} == {
        "timeout": inputs.TIMEOUT, "model": inputs.MODEL,
    }  # fmt: skip
