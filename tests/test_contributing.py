"""CONTRIBUTING shows an adapter being written: what it shows is the adapter itself."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "backends" / "gpt_xp_backends" / "torch_backend.py"


def shown() -> str:
    """The pieces of the adapter, put together as a formatter would."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = contributing.partition("\n## Adding an array library\n")[2].partition("\n## ")[0]
    pieces = re.findall(r"^```python\n(.*?)\n```$", section, re.DOTALL | re.MULTILINE)
    return "\n\n\n".join(pieces) + "\n"


def test_the_adapter_shown_is_the_adapter() -> None:
    lines, expected = shown().splitlines(), ADAPTER.read_text(encoding="utf-8").splitlines()
    for place, (line, right) in enumerate(zip(lines, expected, strict=False)):
        assert line == right, f"line {place + 1} of {ADAPTER.name} is shown otherwise in CONTRIBUTING.md"
    assert len(lines) == len(expected), "CONTRIBUTING.md shows more or less than the adapter"


def test_the_entry_point_shown_is_the_one_that_is_there() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [header, line] = re.findall(r"^```toml\n(.*?)\n```$", contributing, re.DOTALL | re.MULTILINE)[0].splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert line in project.partition(header)[2].partition("\n[")[0]
