"""The process of a library: what is said after it could not be started again."""

import pytest

from gpt_xp.conformance.process import CheckEnded, LibraryProcess
from gpt_xp.hub.find import find_model

# The first process crashes in exp, and holds the GPU from then on.
BUSY_AFTER_A_CRASH = """
import os, pathlib
BUSY = pathlib.Path(__file__).with_name("busy")
if BUSY.exists(): raise RuntimeError("the GPU is busy")
def exp(x, /):
    BUSY.touch()
    os._exit(3)
"""


def test_a_library_that_cannot_be_started_again_says_why_each_time(library):
    with LibraryProcess(library(BUSY_AFTER_A_CRASH), find_model("shakespeare"), None, 60.0) as process:
        assert process.start()["version"] == "0.1"
        with pytest.raises(CheckEnded, match="ended with exit code 3"):
            process.check("function", name="exp")
        for _ in range(2):
            with pytest.raises(CheckEnded, match="the GPU is busy"):
                process.check("function", name="max")
