"""The floor of XLA: the products of GPT-2's layers, of its token table and of its cache alone, in one program.

It computes no logits. It is the floor of gpt-xp on JAX. The cache has the layout that XLA reads fastest: one array for
each layer, which is read completely.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpt_xp_backends.jax_backend import CHUNK_TOKENS

from gpt_xp.backend import few_sizes
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params


def prepare(folder: Path, dtype: str) -> None:
    """Do nothing, because the checkpoint is read unchanged."""


@jax.jit
def products(blocks: Any, wte: Any, x: Any, cache: Any) -> Any:
    """Multiply x [rows, n_embd] with all weights and with the cache in turn, and its last row with the token table.

    `cache` has keys and values [n_head, n_slots, d_head] for each layer, or is empty.
    """
    for layer, block in enumerate(blocks):
        qkv = x @ block["attn"]["c_attn"]["w"]
        x = jnp.sum(jnp.reshape(qkv, (len(x), 3, -1)), axis=1)  # all of them are needed, or XLA leaves some out
        if cache:
            k, v = cache[layer]
            scores = k @ jnp.reshape(x, (len(k), -1, 1))  # [n_head, n_slots, d] @ [n_head, d, 1]: one query
            x = jnp.reshape(jnp.matrix_transpose(scores) @ v, x.shape)
        x = x @ block["attn"]["c_proj"]["w"]
        x = x @ block["mlp"]["c_fc"]["w"] @ block["mlp"]["c_proj"]["w"]
    return x, x[-1:] @ wte.T


class Contender:
    """Products of float32 on the CPU; `threads` are set by NPROC when the process starts."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        self.config = read_config(folder)
        params = jax.tree.map(jnp.asarray, read_params(folder, self.config))
        self.blocks, self.wte = params["blocks"], params["wte"]

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        return {"name": "XLA", "version": jax.__version__, "device": "cpu", "dtype": "float32", "settings": {}}

    def logits(self, tokens: list[int]) -> None:
        """Return None, because it computes no logits."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, in chunks as long as those of gpt-xp on JAX, and of each later token."""
        (prompt,) = prompts
        sizes = [min(CHUNK_TOKENS, len(prompt) - begin) for begin in range(0, len(prompt), CHUNK_TOKENS)]
        chunks = [(self.full(rows, self.config.n_embd), ()) for rows in sizes]
        token = self.full(1, self.config.n_embd)
        caches = {n: self.cache(n) for n in {few_sizes(len(prompt) + step) for step in range(1, n_tokens)}}
        with jax.default_matmul_precision("highest"):
            times = [time.perf_counter()]
            for step in range(n_tokens):
                for x, cache in [(token, caches[few_sizes(len(prompt) + step)])] if step else chunks:
                    jax.block_until_ready(products(self.blocks, self.wte, x, cache))
                times.append(time.perf_counter())
        return np.diff(times).tolist()

    def cache(self, n_slots: int) -> Any:
        """Keys and values of each layer."""
        shape = self.config.n_head, n_slots, self.config.n_embd // self.config.n_head
        return [(self.full(*shape), self.full(*shape)) for _ in range(self.config.n_layer)]

    def full(self, *shape: int) -> Any:
        """Some numbers."""
        return jnp.full(shape, 0.001, dtype=jnp.float32)
