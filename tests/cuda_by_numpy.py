"""What the CUDA kernels are for, computed by NumPy: in the place of `cupy.RawKernel`, and it says what was launched."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpt_xp_backends import cupy_fusion
from gpt_xp_backends.fusion import Program


def evaluate(program: Program, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a program, each step by NumPy's function of its name."""
    values = list(arrays)
    for step in program.steps:
        inputs = [each if isinstance(each, float) else values[each] for each in step.inputs]
        if step.function == "astype":
            value = inputs[0]
        elif step.function in ("max", "sum"):
            value = getattr(np, step.function)(inputs[0], axis=-1, keepdims=True)
        else:
            value = getattr(np, step.function)(*inputs)
        values.append(np.asarray(value, dtype=step.dtype))
    return [values[number] for number in program.outputs]


class ByNumPy:
    """`made` has the source, name and options of each kernel, and `launched` the name of each launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str, tuple[str, ...]]] = []
        self.launched: list[str] = []
        self._programs: dict[str, Program] = {}
        self._source = cupy_fusion.source
        monkeypatch.setattr(cupy_fusion, "source", self._remembered)

    def _remembered(self, program: Program) -> str:
        source = self._source(program)
        self._programs[source] = program
        return source

    def __call__(self, source: str, name: str, options: tuple[str, ...]) -> Callable[..., None]:
        self.made.append((source, name, options))

        def launch(grid: tuple[int, int], block: tuple[int, int], arguments: tuple[Any, ...]) -> None:
            self.launched.append(name)
            arrays = [each.view(np.ndarray) for each in arguments if isinstance(each, np.ndarray)]
            if name == cupy_fusion.NAME:
                program = self._programs[source]
                n_given = len(program.given)
                given, outputs = arrays[:n_given], arrays[n_given:]
                results = evaluate(program, given)
            else:
                outputs, results = arrays[2:], [arrays[0] @ arrays[1]]
            for out, result in zip(outputs, results, strict=True):
                out[...] = result

        return launch
