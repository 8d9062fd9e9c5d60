"""Random expressions of traced arrays, some held and some dropped, beside the same computed at once; planted bugs."""

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from cuda_by_numpy import evaluate
from gpt_xp_backends import programs, tracing
from hypothesis import strategies as st

SHAPES = ((5, 7), (3, 5, 7), (5, 1), (5, 7), (1, 7), (2, 1, 5, 7))  # of the products that each program begins with


def mean(x: Any, xp: Any) -> Any:
    return xp.mean(x, axis=-1, keepdims=True)


# Each keeps numbers small: two arrays that grew to infinity would look the same whatever became of them.
MADE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda x, y, xp: x + y,
    "subtract": lambda x, y, xp: 0.5 * x - y,
    "multiply": lambda x, y, xp: xp.tanh(x) * y,
    "divide": lambda x, y, xp: x / (xp.exp(xp.tanh(y)) + 1),
    "array first": lambda x, y, xp: ARRAY.copy() - x,
    "array last": lambda x, y, xp: x - ARRAY.copy(),
    "twice": lambda x, y, xp: xp.sqrt(x * x + 1),
    "half": lambda x, y, xp: xp.astype(x, np.float32),
    "largest": lambda x, y, xp: x - xp.max(x, axis=-1, keepdims=True),
    "sum": lambda x, y, xp: xp.tanh(xp.sum(x, axis=-1, keepdims=True)),
    "centered": lambda x, y, xp: x - mean(x, xp),
    "of a view": lambda x, y, xp: xp.tanh(x[..., :1]) + y,
    "deviation": lambda x, y, xp: mean(xp.tanh(x) * xp.tanh(x), xp),
}
ACTIONS = (*MADE, "drop", "drop", "compute", "view")
ARRAY = np.random.RandomState(7).standard_normal(7)
Instructions = Sequence[tuple[str, int, int]]
INSTRUCTIONS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 29), st.integers(0, 29)), max_size=25)
EAGER = types.SimpleNamespace(**vars(np) | {"astype": lambda x, dtype: x.astype(dtype)})


class Spiteful:
    """Computes a program step by step, and spoils whatever it is told that nobody reads any more."""

    def __init__(self) -> None:
        self.programs: list[programs.Program] = []
        self.n_spoiled = 0

    def __call__(self, program: Any, arrays: list[Any], shape: tuple[int, ...], reusable: frozenset[int]) -> list[Any]:
        self.programs.append(program)
        outputs = evaluate(program, arrays)
        for place in reusable:
            arrays[place][...] = np.nan
        self.n_spoiled += len(reusable)
        return outputs


def check(instructions: Instructions, compute: Any, module: Any = tracing) -> None:
    """Follow the instructions on traced arrays and on eager ones, and compare all that is still in anybody's hands."""
    random = np.random.RandomState(3)
    xp = module.Tracer(np, module.Calls(lambda x, w, scale: x.copy(), compute))
    held = [(xp.matmul(array, ARRAY), array) for array in (random.standard_normal(shape) for shape in SHAPES)]
    escaped: list[tuple[Any, Any]] = []
    for action, i, j in instructions:
        (x, right), (y, other) = held[i % len(held)], held[j % len(held)]
        if action == "drop":
            del held[i % len(held)], x
            held = held or [(xp.matmul(ARRAY[None], ARRAY), ARRAY[None])]
        elif action == "compute":
            escaped.append((xp.computed(x), right))
        elif action == "view":
            escaped.append((x[..., :1], right[..., :1]))
        else:
            held.append((MADE[action](x, y, xp), MADE[action](right, other, EAGER)))
        x = y = None  # no handle but those that are held
    for each, right in [(xp.computed(each), right) for each, right in escaped + held]:
        assert (each.shape, each.dtype) == (right.shape, right.dtype)
        error = np.abs(each - right).max() / max(1, np.abs(right).max())
        assert error <= (1e-13 if right.dtype == np.float64 else 1e-5), f"off by {error}"


def random_instructions(seed: int, n: int = 25) -> Instructions:
    random = np.random.RandomState(seed)
    return [(ACTIONS[random.randint(len(ACTIONS))], *random.randint(0, 30, 2).tolist()) for _ in range(n)]


def planted(old: str, new: str) -> Any:
    """Return another `tracing`, with a mistake in its source or in that of `programs`."""
    sources = {module.__name__: Path(module.__file__).read_text() for module in (programs, tracing)}
    assert sum(source.count(old) for source in sources.values()) == 1, old
    with patch.dict(sys.modules):
        for name, source in sources.items():
            sys.modules[name] = wrong = types.ModuleType(name)
            exec(compile(source.replace(old, new), name, "exec"), vars(wrong))
    return wrong
