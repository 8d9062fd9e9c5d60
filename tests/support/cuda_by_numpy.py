"""What the CUDA kernels are for, computed by NumPy: in the place of `cupy.RawKernel`, and it says what was launched."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpt_xp_backends.cupy_backend.kernels import programs
from gpt_xp_backends.programs import Program


def evaluate(program: Program, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a program, each operation by NumPy's function of its name."""
    values = list(arrays)
    for operation in program.operations:
        inputs = [each if isinstance(each, float) else values[each] for each in operation.inputs]
        if operation.function == "astype":
            value = inputs[0]
        elif operation.function in ("max", "sum"):
            value = getattr(np, operation.function)(inputs[0], axis=-1, keepdims=True)
        else:
            value = getattr(np, operation.function)(*inputs)
        values.append(np.asarray(value, dtype=operation.dtype))
    return [values[number] for number in program.outputs]


def run_fused(program: Program, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    n_given, n_outputs = len(program.given), len(program.outputs)
    results = evaluate(program, arrays[:n_given])
    for out, result in zip(arrays[n_given : n_given + n_outputs], results, strict=True):
        out[...] = result
    if cache := arrays[n_given + n_outputs :]:
        k, v, position = cache
        batch, n_head, n_slots, d_head = k.shape
        parts = results[0].reshape(batch, 3, n_head, d_head)
        k[:, :, position % n_slots], v[:, :, position % n_slots] = parts[:, 1], parts[:, 2]


def run_thin_product(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    x, w, out = arrays
    out[...] = x / arguments[-1] @ w


def run_table_product(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    x, w, out = arrays
    out[...] = x @ w


def run_split_product(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    x, w, parts = arrays
    length = arguments[5]
    for place, part in enumerate(parts):
        some = slice(place * length, (place + 1) * length)
        part[...] = x[:, some].astype(part.dtype) @ w[some].astype(part.dtype)


def run_attend(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    q, k, v, mask, out = (each if place == 4 else each.astype(np.float64) for place, each in enumerate(arrays))
    scores = q / arguments[6] @ k.swapaxes(-1, -2) + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out[...] = weights / weights.sum(axis=-1, keepdims=True) @ v


def run_likeliest_of_parts(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    logits, allowed, parts = arrays
    scores = np.where(allowed, logits, np.finfo(logits.dtype).min) if arguments[4] else logits
    second, best = np.sort(scores, axis=-1)[:, -2:].T
    largest = logits.max(axis=-1)
    total = np.exp(logits - largest[:, None]).sum(axis=-1)
    parts[...] = np.stack([best, scores.argmax(axis=-1), second, largest, total], axis=-1)[:, None]


def run_likeliest(_: None, arrays: list[np.ndarray], arguments: tuple[Any, ...]) -> None:
    parts, found = arrays
    best, token, second, largest, total = parts[:, 0].T
    found[...] = np.stack([token, best - largest - np.log(total), best - second], axis=-1)


# (the program of a fused kernel, the arrays among the arguments, all arguments)
LAUNCHES: dict[str, Callable[..., None]] = {
    programs.NAME: run_fused,
    "thin_product": run_thin_product,
    "table_product": run_table_product,
    "split_product": run_split_product,
    "attend": run_attend,
    "likeliest_of_parts": run_likeliest_of_parts,
    "likeliest": run_likeliest,
}


class ByNumPy:
    """`made` has the source, name and options of each kernel, and `launched` the name of each launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str, tuple[str, ...]]] = []
        self.launched: list[str] = []
        self._programs: dict[str, Program] = {}
        self._source = programs.source
        monkeypatch.setattr(programs, "source", self._remembered)

    def _remembered(self, program: Program, appends: bool = False) -> str:
        source = self._source(program, appends)
        self._programs[source] = program
        return source

    def __call__(self, source: str, name: str, options: tuple[str, ...]) -> Callable[..., None]:
        self.made.append((source, name, options))

        def launch(grid: tuple[int, int], block: tuple[int, int], arguments: tuple[Any, ...]) -> None:
            self.launched.append(name)
            arrays = [each.view(np.ndarray) for each in arguments if isinstance(each, np.ndarray)]
            LAUNCHES[name](self._programs.get(source), arrays, arguments)

        return launch
