"""Single checks, made in this process."""

from pathlib import Path

from gpt_xp.conformance.checks import Checks


def test_sampling_needs_no_model():
    assert Checks("numpy", Path("no-model"), None, []).program("sampling").is_ok
