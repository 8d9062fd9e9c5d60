"""The notebooks: small, and without outputs but one picture each. `python notebooks/run.py` runs them, and CI does."""

import json
from pathlib import Path

import pytest
from folders import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_two() -> None:
    assert [path.name for path in NOTEBOOKS] == ["compare-on-a-gpu.ipynb", "learn.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_one_picture_and_nothing_else(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    [output] = [output for cell in code for output in cell["outputs"]]
    assert set(output["data"]) == {"image/png", "text/plain"}
    assert all(cell["execution_count"] is None for cell in code)
    assert path.stat().st_size < 150_000
