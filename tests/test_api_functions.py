"""The functions of the array API standard that gpt-xp uses: what an author of an array library wants to know.

Run as a script, this file writes the list into docs/adding-a-backend.md. As a test, it checks that the page has it.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Model

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-backend.md"
BEGIN, END = "<!-- array API functions: begin -->\n", "\n<!-- array API functions: end -->"


class Recorder:
    """A namespace that notes which of its names are used."""

    parts: ClassVar[dict[str, Any]] = {}  # which no library has: no part of the model is replaced

    def __init__(self, xp: Any) -> None:
        self.used: set[str] = set()
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._xp, name)


def used_functions() -> tuple[list[str], list[str]]:
    """What the model uses, and what the cache, the sampling and the generation use besides."""
    name = "long"  # its cache grows
    backend = make_backend("array-api-strict")
    recorder = Recorder(backend.xp)
    params = Model(small_params(name), CONFIGS[name], backend=backend).params
    tokens = backend.asarray(small_tokens(name))
    gpt_xp.gpt2(params, tokens, CONFIGS[name], xp=recorder)
    gpt_xp.lm_loss(params, tokens, CONFIGS[name], xp=recorder)
    model = set(recorder.used)

    running = Model(small_params(name), CONFIGS[name], backend=backend.replace(xp=recorder))
    options = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1}
    running.generate([[1, 2, 3], [4]], max_tokens=70, **options)
    running.logits([1, 2, 3])
    return sorted(model), sorted(recorder.used - model)


def section() -> str:
    model, more = used_functions()
    return f"The model: {code(model)}.\n\nCache, sampling and generation use besides: {code(more)}."


def code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def test_the_page_lists_the_functions_of_the_standard_that_are_used() -> None:
    found = re.search(f"{BEGIN}(.*?){END}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the page has no place for the list"
    assert found[1] == section(), "run: PYTHONPATH=tests/support python tests/test_api_functions.py"


def test_the_recorder_sees_what_is_used() -> None:
    recorder = Recorder(np)
    gpt_xp.transformer.gelu(np.ones(3), xp=recorder)
    assert recorder.used == {"tanh"}


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + section() + END, text, flags=re.DOTALL), encoding="utf-8"
    )
