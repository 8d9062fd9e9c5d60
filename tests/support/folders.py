"""The folders of this repository that the tests use."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN_FILES = TESTS / "goldens"
BENCHMARKS = ROOT / "benchmarks"
SHAKESPEARE = ROOT / "gpt_xp" / "models" / "shakespeare"
