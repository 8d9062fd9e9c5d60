"""What XLA can do: the products of GPT-2's layers and of its token table in one compiled program, and nothing else.

No engine: it computes no logits. It is the floor of gpt-xp on JAX, as the bare products in NumPy are that of NumPy.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpt_xp_backends.jax_backend import LONG

from gpt_xp.checkpoint import read_config, read_params


def prepare(folder: Path, dtype: str) -> None:
    """Nothing: the checkpoint is read as it is."""


@jax.jit
def products(blocks: Any, wte: Any, x: Any) -> Any:
    """Multiply x [rows, n_embd] with all weights in turn, and its last row with the token table."""
    for block in blocks:
        qkv = x @ block["attn"]["c_attn"]["w"]
        x = jnp.sum(jnp.reshape(qkv, (len(x), 3, -1)), axis=1)  # all of them are needed, or XLA leaves some out
        x = x @ block["attn"]["c_proj"]["w"]
        x = x @ block["mlp"]["c_fc"]["w"] @ block["mlp"]["c_proj"]["w"]
    return x, x[-1:] @ wte.T


class Contender:
    """Products of float32 on the CPU; `threads` are set by NPROC when the process starts."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        config = read_config(folder)
        params = jax.tree.map(jnp.asarray, read_params(folder, config))
        self.blocks, self.wte, self.n_embd = params["blocks"], params["wte"], config.n_embd

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        return {"name": "XLA", "version": jax.__version__, "device": "cpu", "dtype": "float32", "settings": {}}

    def logits(self, tokens: list[int]) -> None:
        """There are none."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, in pieces as long as those of gpt-xp on JAX, and of each later token."""
        total = len(prompts) * len(prompts[0])
        pieces = [self.rows(min(LONG, total - begin)) for begin in range(0, total, LONG)]
        token = self.rows(len(prompts))
        with jax.default_matmul_precision("highest"):
            times = [time.perf_counter()]
            for rows in [pieces, *[[token]] * (n_tokens - 1)]:
                for x in rows:
                    jax.block_until_ready(products(self.blocks, self.wte, x))
                times.append(time.perf_counter())
        return np.diff(times).tolist()

    def rows(self, n: int) -> Any:
        """Some numbers, [n, n_embd]."""
        return jnp.full((n, self.n_embd), 0.5, dtype=jnp.float32)
