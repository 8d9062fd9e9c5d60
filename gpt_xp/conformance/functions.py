"""The functions of the array API standard that gpt-xp uses, each as GPT-2 calls it, on small arrays.

This is the only list of them. A test records what the model really uses, and compares it with the list.
"""

from dataclasses import dataclass
from typing import Any

import array_api_compat.numpy as np
import numpy

from gpt_xp.kv_cache import LayerCache
from gpt_xp.types import NumpyArray

PROGRAMS = ("forward pass", "cache", "loss", "sampling")
# These programs need no other program, and are checked without NumPy's help alone.
ALONE = ("forward pass", "sampling")


@dataclass(frozen=True)
class Use:
    """One name of the namespace, the calls that GPT-2 makes, and the `PROGRAMS` that fail without it.

    Where the forward pass needs a name, nothing else is named: everything else needs the forward pass.
    """

    needed_for: tuple[str, ...]
    calls: tuple[str, ...]


def _use(needed_for: str, *calls: str) -> Use:
    return Use(tuple(needed_for.split(", ")), calls)


NAMES = {
    "arange": _use("forward pass", "xp.arange(5, dtype=xp.int32, device=device)"),
    "astype": _use("forward pass", "xp.astype(is_one, xp.float32)", "xp.astype(x, x.dtype, copy=False)"),
    "broadcast_to": _use("forward pass", "xp.broadcast_to(tokens, (2, 6))"),
    "exp": _use("forward pass", "xp.exp(x)", "xp.exp(-9 * x * x)"),  # softmax needs small ones too
    "finfo": _use("forward pass", "float(xp.finfo(xp.float32).min)", "float(xp.finfo(x.dtype).min)"),
    "float32": _use("forward pass", "x.dtype == xp.float32", "tokens.dtype == xp.float32"),
    "float64": _use("forward pass", "x.dtype == xp.float64"),
    "int32": _use("forward pass", "tokens.dtype == xp.int32"),
    "matmul": _use("forward pass", "xp.matmul(x, w)", "xp.matmul(q, k_t)"),
    "matrix_transpose": _use("forward pass", "xp.matrix_transpose(x)", "xp.matrix_transpose(q)"),
    "max": _use("forward pass", "xp.max(x, axis=-1, keepdims=True)", "xp.max(x, axis=-1)"),
    "mean": _use("forward pass", "xp.mean(x, axis=-1, keepdims=True)", "xp.mean(x)"),
    "permute_dims": _use("forward pass", "xp.permute_dims(qkv, (2, 0, 3, 1, 4))", "xp.permute_dims(q, (0, 2, 1, 3))"),
    "reshape": _use("forward pass", "xp.reshape(x, (-1, 3, 3, 2, 2))", "xp.reshape(x, (-1,))"),
    "sqrt": _use("forward pass", "xp.sqrt(x * x + 1e-5)"),
    "sum": _use(
        "forward pass", "xp.sum(x, axis=-1, keepdims=True)", "xp.sum(x, axis=-1)",
        "xp.sum(tokens[:, None], axis=-1, keepdims=True, dtype=xp.int32)",
    ),
    "take": _use("forward pass", "xp.take(x, tokens, axis=0)"),
    "tanh": _use("forward pass", "xp.tanh(x)"),
    # The cache.
    "asarray": _use("cache", "xp.asarray(x, copy=True)", "xp.asarray([0, 2], dtype=xp.int32, device=device)"),
    "clip": _use("cache, sampling", "xp.clip(tokens, 0, 3)", "xp.clip(x, 0.0, 1e6)"),
    "concat": _use("cache", "xp.concat([cache_k, cache_v], axis=-2)"),
    "zeros": _use("cache", "xp.zeros((6, 8, 2), dtype=x.dtype, device=device)"),
    # The loss, and choosing the next token on the device.
    "log": _use("loss, sampling", "xp.log(xp.sum(xp.exp(x), axis=-1))"),
    "take_along_axis": _use("loss, sampling", "xp.take_along_axis(x, tokens[:, None], axis=-1)"),
    "argmax": _use("sampling", "xp.argmax(x, axis=-1)"),
    "cumulative_sum": _use(
        "sampling", "xp.cumulative_sum(x, axis=-1)", "xp.cumulative_sum(tokens[None, :], axis=-1, dtype=xp.int32)"
    ),
    "full": _use("sampling", "xp.full((), -1.5, dtype=x.dtype, device=device)",
                 "xp.full((6, 1), 3, dtype=xp.int32, device=device)"),
    "sort": _use("sampling", "xp.sort(x, axis=-1, descending=True, stable=False)"),
    "where": _use("sampling", "xp.where(is_one[:, None], x, 2 * x)"),
}  # fmt: skip

# The behaviour of arrays that no name stands for.
BEHAVIOUR = {
    "operators": _use(
        "forward pass", "0.5 * x * (1 + x * x) / 2 - x", "~is_one | (tokens <= 3) & is_one", "(tokens - 9) % 4", "x > 0"
    ),
    "indexing": _use("forward pass", "qkv[0, ...]", "x[None, :, 1:]", "tokens[..., 1:, None]", "x[:, -1]"),
    "writing": _use("cache", "LayerCache(cache_k, cache_v, 5).append(new, new, xp)[1]"),
}

FUNCTIONS = NAMES | BEHAVIOUR


def small_arrays() -> dict[str, NumpyArray]:
    """Return the arrays that the calls name, new ones each time, because `writing` changes them."""
    random = numpy.random.default_rng(0)
    shapes = {
        "x": (6, 6), "w": (6, 18), "q": (2, 3, 5, 4), "k_t": (2, 3, 4, 5), "qkv": (2, 5, 3, 3, 4),
        "cache_k": (6, 8, 2), "cache_v": (6, 8, 2), "new": (2, 3, 2, 2),
    }  # fmt: skip
    arrays: dict[str, Any] = {name: random.standard_normal(shape, numpy.float32) for name, shape in shapes.items()}
    arrays["tokens"] = numpy.asarray([3, 1, 4, 1, 5, 2], dtype=numpy.int32)
    arrays["is_one"] = arrays["tokens"] == 1
    return arrays


def evaluate(call: str, xp: Any, arrays: dict[str, Any], device: Any) -> Any:
    """Return the value of one of the calls in the namespace `xp`."""
    return eval(call, {"xp": xp, "device": device, "LayerCache": LayerCache, **arrays})


def expected(call: str) -> NumpyArray:
    """Return what NumPy computes for a call."""
    return numpy.asarray(evaluate(call, np, small_arrays(), "cpu"))
