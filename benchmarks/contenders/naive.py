"""GPT-2 with picoGPT's algorithm, written again: without a cache, so each new token computes the whole text again.

All of it is float32, which is an advantage: picoGPT's constants make NumPy 2 compute in float64, which is slower.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params


def prepare(folder: Path, dtype: str) -> None:
    """Do nothing, because the checkpoint is read unchanged."""


def norm(x: Any, g: Any, b: Any) -> Any:
    return g * (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + np.float32(1e-5)) + b


def affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def feed_forward(x: Any, c_fc: Any, c_proj: Any) -> Any:
    x = affine(x, **c_fc)
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return affine(x, **c_proj)


def look_back(x: Any, c_attn: Any, c_proj: Any, n_head: int) -> Any:
    """One head after the other, each with a matrix of all positions by all positions."""
    n_seq, n_embd = x.shape
    future = np.triu(np.full((n_seq, n_seq), -1e10, dtype=np.float32), k=1)
    q, k, v = (np.split(part, n_head, axis=-1) for part in np.split(affine(x, **c_attn), 3, axis=-1))
    heads = []
    for head in range(n_head):
        scores = q[head] @ k[head].T / math.sqrt(n_embd // n_head) + future
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(powers / powers.sum(axis=-1, keepdims=True) @ v[head])
    return affine(np.hstack(heads), **c_proj)


def all_logits(tokens: list[int], wte: Any, wpe: Any, blocks: Any, ln_f: Any, n_head: int) -> Any:
    """Return the logits of every position, [n_seq, n_vocab] float32."""
    x = wte[tokens] + wpe[: len(tokens)]
    for block in blocks:
        x = x + look_back(norm(x, **block["ln_1"]), **block["attn"], n_head=n_head)
        x = x + feed_forward(norm(x, **block["ln_2"]), **block["mlp"])
    return norm(x, **ln_f) @ wte.T


class Contender:
    """`dtype` is float32."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        config = read_config(folder)
        # Copied into memory of its own, as picoGPT's loader does.
        self.params = copied(read_params(folder, config))
        self.n_head, self.threads = config.n_head, threads

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        return {"name": "picoGPT's algorithm", "version": f"NumPy {np.__version__}", "device": "cpu",
                "dtype": "float32", "settings": {"threads": str(self.threads)}}  # fmt: skip

    def logits(self, tokens: list[int]) -> Any:
        """Return the logits [n_vocab] after the last token."""
        return all_logits(tokens, **self.params, n_head=self.n_head)[-1]

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, and of each later token of all rows."""
        rows = [list(prompt) for prompt in prompts]
        seconds = []
        for _ in range(n_tokens):
            begin = time.perf_counter()
            for row in rows:  # it knows no batch
                row.append(int(self.logits(row).argmax()))
            seconds.append(time.perf_counter() - begin)
        return seconds


def copied(node: Any) -> Any:
    """Return the params in float32 arrays of their own."""
    if isinstance(node, dict):
        return {name: copied(child) for name, child in node.items()}
    if isinstance(node, list):
        return [copied(child) for child in node]
    return np.array(node, dtype=np.float32)
