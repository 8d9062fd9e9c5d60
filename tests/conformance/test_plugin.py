"""The plugin of pytest: an item for each check, and nothing at all unless it is asked for."""

import re
import sys
from pathlib import Path

import pytest
from commands import Result, process
from folders import ROOT
from libraries import skipping_what_is_missing
from third_party import installed

from gpt_xp.conformance.run import check_names

pytestmark = pytest.mark.slow  # They run pytest, which runs a whole model.


def run_pytest(folder: Path, *args: str) -> Result:
    """Run pytest in an empty folder with this plugin alone."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpt_xp.conformance.plugin"]
    environment = installed(folder) | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return process(*args, command=command, cwd=folder)


def test_the_entry_point_is_the_plugin():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\ngpt-xp = "gpt_xp.conformance.plugin"\n' in project


def test_each_check_is_an_item_and_a_failure_has_one_line(tmp_path):
    with skipping_what_is_missing("array-api-strict"):
        import array_api_strict  # noqa: F401
    (tmp_path / "planted_library.py").write_text("from array_api_strict import *\ndel take_along_axis\n")
    result = run_pytest(tmp_path, "--pyargs", "gpt_xp.conformance", "--gpt-xp-backend", "planted_library", "-v")
    assert result.code == 1, result
    items = re.findall(r"^gpt_xp::(.*) (PASSED|FAILED|SKIPPED)", result.out, re.MULTILINE)
    assert [name for name, _ in items] == ["loading", *check_names("numpy")]
    assert [name for name, outcome in items if outcome != "PASSED"] == ["take_along_axis", "loss", "sampling"]
    [reason] = re.findall(r"_ gpt_xp::take_along_axis _+\n(.*)\n_", result.out)
    assert reason == "xp.take_along_axis(x, tokens[:, None], axis=-1): it is missing (needed for: loss, sampling)"
    assert "Traceback" not in result.out


def test_a_library_that_cannot_be_loaded_fails_once(tmp_path):
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no driver')\n")
    result = run_pytest(tmp_path, "--pyargs", "gpt_xp.conformance", "--gpt-xp-backend", "broken_library", "-q")
    assert result.code == 1
    assert "broken_library cannot be imported: RuntimeError: no driver" in result.out
    assert re.search(rf"1 failed, {len(check_names('numpy'))} skipped", result.out)


def test_an_unknown_library_is_an_error_of_collection(tmp_path):
    result = run_pytest(tmp_path, "--pyargs", "gpt_xp.conformance", "--gpt-xp-backend", "no_such_library")
    assert result.code != 0
    assert "there is no module 'no_such_library' here" in result.out


def test_a_wrong_timeout_is_an_error_of_collection(tmp_path):
    options = ["--gpt-xp-backend", "numpy", "--gpt-xp-timeout", "0"]
    result = run_pytest(tmp_path, "--pyargs", "gpt_xp.conformance", *options)
    assert result.code != 0
    assert "timeout must be more than 0 and at most" in result.out
    assert "Traceback" not in result.out
    assert re.search(r"^=+ 1 error in", result.out, re.MULTILINE)


def test_without_the_option_nothing_is_loaded_and_nothing_collected(tmp_path):
    (tmp_path / "test_own.py").write_text(
        "import sys\n"
        "def test_own():\n"
        "    assert {name for name in sys.modules if name.startswith('gpt_xp')} == "
        "{'gpt_xp', 'gpt_xp.conformance', 'gpt_xp.conformance.plugin', *WITH_GPT_XP}\n"
        "    assert 'numpy' not in sys.modules\n"
        "WITH_GPT_XP = {'gpt_xp.version'}\n"
    )
    result = run_pytest(tmp_path, "-q", "test_own.py")
    assert result.code == 0, result.out
    assert "1 passed" in result.out
    assert run_pytest(tmp_path, "-q", "--pyargs", "gpt_xp.conformance").code == 5  # no tests were collected
