"""Packages that are not part of gpt-xp, installed for one process, and a checkpoint that shows their mistakes."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpt_xp import GPT2Config

WRONG_BACKENDS = Path(__file__).with_name("wrong_backends")  # see its `wrong_backends/__init__.py`


def installed(*folders: Path) -> dict[str, str]:
    """Return the variables that let a new process find the packages in these folders first."""
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *([rest] if rest else [])])}


@contextmanager
def third_party_installed() -> Iterator[None]:
    """The package with wrong backends is installed, for this process and for those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(WRONG_BACKENDS)
        for name, value in installed(WRONG_BACKENDS).items():
            patch.setenv(name, value)
        yield


def with_large_scores(params: Any, config: GPT2Config, layer: int) -> Any:
    """Return NumPy params with all of one layer's attention scores at about 120; e^120 overflows float32.

    The added score is almost the same for every key, and softmax subtracts it again. So a right backend stays as exact
    as before.
    """
    params = copy.deepcopy(params)
    d_head = config.n_embd // config.n_head
    bias = params["blocks"][layer]["attn"]["c_attn"]["b"]  # queries, keys, values; each head by head
    bias[: config.n_embd : d_head] += 10.0  # the first number of each query
    bias[config.n_embd : 2 * config.n_embd : d_head] += 12.0 * math.sqrt(d_head)  # and of each key
    return params
