"""The floor of int8 on NumPy: the products of GPT-2's layers, of its token table and of its cache alone.

It computes no logits. It is the floor of `gpt-xp numpy+int8`, with the same compiled products and threads.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

import gpt_xp
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.quantization import quantized_backend
from gpt_xp.registry import get_backend


def prepare(folder: Path, dtype: str) -> None:
    """Do nothing, because the checkpoint is read unchanged."""


def products(params: Any, tokens: Any, cache: Any, xp: Any) -> Any:
    """Multiply tokens [rows] with all weights in turn, a single row with the cache too, the last row with wte."""
    x = xp.take(params["wte"], tokens, axis=0)
    for block, (query, k, weights, v) in zip(params["blocks"], cache, strict=True):
        x = xp.matmul(x, block["attn"]["c_attn"]["w"])[:, : x.shape[1]]
        if len(tokens) == 1:
            xp.matmul(query, k.mT)
            xp.matmul(weights, v)
        for part, name in (("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            x = xp.matmul(x, block[part][name]["w"])
    return xp.matmul(x[-1:], xp.matrix_transpose(params["wte"]))


class Contender:
    """Products with quantized weights on the CPU."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        self.config = read_config(folder)
        self.params = gpt_xp.quantize(read_params(folder, self.config), "int8")
        self.backend = quantized_backend(get_backend("numpy", threads=threads))
        self.products = self.backend.compile(products)

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        backend = self.backend
        return {"name": "numpy", "version": backend.version, "device": "cpu", "dtype": "int8", "settings": {}}

    def logits(self, tokens: list[int]) -> None:
        """Return None, because it computes no logits."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, in chunks as long as gpt-xp's, and of each later token."""
        (prompt,) = prompts
        length = self.backend.chunk_tokens(1)
        chunks = [min(length, len(prompt) - begin) for begin in range(0, len(prompt), length)]
        layers = [self.layer(len(prompt) + n_tokens) for _ in range(self.config.n_layer)]
        times = [time.perf_counter()]
        for step in range(n_tokens):
            n_slots = len(prompt) + step
            cache = [(query, k[:, :, :n_slots], weights[..., :n_slots], v[:, :, :n_slots])
                     for query, k, weights, v in layers]  # fmt: skip
            for rows in [1] if step else chunks:
                self.products(self.params, np.zeros(rows, dtype=np.int32), cache, xp=self.backend.xp)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def layer(self, n_slots: int) -> list[Any]:
        """A query, keys, weights and values of one layer, full of some number."""
        n_head, d_head = self.config.n_head, self.config.n_embd // self.config.n_head
        shapes = (1, d_head), (n_slots, d_head), (1, n_slots), (n_slots, d_head)
        return [np.full((1, n_head, *shape), 0.5, dtype=np.float32) for shape in shapes]
