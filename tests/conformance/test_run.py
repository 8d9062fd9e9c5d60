"""The order of the checks, with a library's process that is made up."""

import pytest

from gpt_xp.conformance import report, run
from gpt_xp.conformance.functions import FUNCTIONS, PROGRAMS
from gpt_xp.conformance.process import CheckEnded
from gpt_xp.conformance.run import conform


class HangingProcess:
    """The process of a library in which the first functions hang, and the forward pass needs them."""

    def __init__(self, *arguments):
        self.hang = [*FUNCTIONS][: run.MOST_HUNG]
        self.replaced = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self):
        return {"version": "1", "device": "cpu", "used": "as it is"}

    def replace(self, names):
        self.replaced = [*names]

    def check(self, do, **arguments):
        name = arguments.get("name", do)
        if name in self.hang or (do == "program" and self.replaced != self.hang):
            raise CheckEnded("it took longer", hung=name in self.hang)
        if do in ("layers", "text"):
            raise CheckEnded("these are not needed here")
        return {"name": name, "kind": do, "is_ok": True, "line": None, "needed_for": [], "figures": {"ran": True}}


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(run, "LibraryProcess", HangingProcess)
    return conform("numpy")


def test_after_three_hung_checks_numpy_computes_these_alone(found):
    hung, others = [*FUNCTIONS][: run.MOST_HUNG], [*FUNCTIONS][run.MOST_HUNG :]
    functions = found.of("function")
    assert [each.name for each in functions if each.is_ok is False] == hung
    assert [each.name for each in functions if each.is_ok is None] == others
    assert list(found.replaced) == hung


def test_numpy_does_not_help_the_programs_that_are_checked_alone(found):
    assert {each.name: each.is_ok for each in found.of("program")} == {
        name: None if name in ("forward pass", "sampling") else True for name in PROGRAMS
    }


def test_a_row_of_markdown_tells_apart_what_fails_and_what_was_not_checked(found):
    _, _, row = report.as_markdown([found]).splitlines()
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4].startswith("0 of 32; not `arange`, `astype`, `broadcast_to`; not checked: `exp`, ")
    assert cells[5] == "not checked: forward pass, sampling"
