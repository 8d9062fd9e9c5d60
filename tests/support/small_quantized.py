"""Small quantized models, and their weights in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
from small_models import CONFIGS, small_params

import gpt_xp
from gpt_xp import GPT2Config
from gpt_xp.quantization import Quantized, QuantizedTable
from gpt_xp.tree import tree_map

KINDS = ["int4", "int8"]


def small(kind: str) -> tuple[Any, GPT2Config]:
    """Return quantized params and their config."""
    name = {"int8": "prime", "int4": "124M-ratios"}[kind]  # int4 needs a width of whole groups.
    params = float32_params(name)
    return gpt_xp.quantize(params | {"blocks": params["blocks"][:2]}, kind), replace(CONFIGS[name], n_layer=2)


def float32_params(name: str) -> Any:
    return tree_map(lambda leaf: leaf.astype(np.float32), small_params(name))


def float64_of(params: Any) -> Any:
    """Return the params with each quantized weight dequantized to float64."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return np.asarray(leaf, np.float64)
        table = decode(np.asarray(leaf.q), np.asarray(leaf.scale, np.float64))
        return table if isinstance(leaf, QuantizedTable) else table.T

    return tree_map(widen, params)


def decode(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Dequantize one code at a time, following the description of the format."""
    if q.dtype == np.int8:
        return np.array([[float(code) * s for code in row] for row, s in zip(q, scale, strict=True)])
    table = np.zeros((len(q), 2 * q.shape[1]))
    for i, j in np.ndindex(q.shape):
        group, place = divmod(j, 16)
        table[i, 32 * group + place] = (int(q[i, j]) % 16 - 8) * scale[i, group]
        table[i, 32 * group + 16 + place] = (int(q[i, j]) // 16 - 8) * scale[i, group]
    return table
