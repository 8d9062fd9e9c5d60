"""The functions of the array API standard that gpt-xp uses: what an author of an array library wants to know.

`gpt_xp/conformance/functions.py` has the list. The tests compare it with what the model really uses. Run as a script,
this file writes the list into docs/adding-a-backend.md.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import GenerationSettings, Model
from gpt_xp.conformance.functions import BEHAVIOUR, FUNCTIONS, NAMES, PROGRAMS, expected
from gpt_xp.generation.choosing import Choosing
from gpt_xp.generation.rows import Prompt

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


def used_functions() -> dict[str, set[str]]:
    """Return the names that each of `PROGRAMS` uses."""
    name = "long"  # its cache grows
    config, backend = CONFIGS[name], make_backend("array-api-strict")
    params = Model(small_params(name), config, backend=backend).params
    tokens = backend.asarray(small_tokens(name))
    recorders = {program: Recorder(backend.xp) for program in PROGRAMS}
    gpt_xp.gpt2(params, tokens, config, xp=recorders["forward pass"])
    gpt_xp.lm_loss(params, tokens, config, xp=recorders["loss"])

    def running(program: str, **changes: Any) -> Model:
        recording = backend.replace(xp=recorders[program], asarray=backend.asarray, **changes)
        return Model(small_params(name), config, backend=recording)

    cached = running("cache", samples_on_host=True)
    cached.generate([[1, 2, 3], [4]], max_tokens=70)
    cached.logits([1, 2, 3])
    gpt_xp.new_cache(config, params["wpe"], 8, [0, 1], xp=recorders["cache"]).copy(xp=recorders["cache"])
    options = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1}
    chooser = running("sampling")._generator.chooser
    choosing = Choosing(chooser, [Prompt([1, 2], seed=1)], GenerationSettings(**options))
    choosing.choose(backend.asarray(np.ones((1, config.n_vocab), dtype=np.float32)), 0)
    choosing.add([3])
    return {program: recorder.used for program, recorder in recorders.items()}


def section() -> str:
    model = [name for name, use in NAMES.items() if {"forward pass", "loss"}.intersection(use.needed_for)]
    more = set(NAMES) - set(model)
    return f"The model: {code(sorted(model))}.\n\nCache, sampling and generation use besides: {code(sorted(more))}."


def code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def test_the_list_has_what_each_program_uses() -> None:
    used = used_functions()
    expected = {}
    for name in set().union(*used.values()):
        programs = tuple(program for program in PROGRAMS if name in used[program])
        expected[name] = ("forward pass",) if "forward pass" in programs else programs
    assert {name: use.needed_for for name, use in NAMES.items()} == expected


@pytest.mark.parametrize("name", [*FUNCTIONS])
def test_each_call_is_right_on_numpy_and_names_its_function(name: str) -> None:
    for call in FUNCTIONS[name].calls:
        assert expected(call).size
        assert name in BEHAVIOUR or re.search(rf"\bxp\.{name}\b", call)


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
