"""Small GPT-2s with random weights, the same on every machine and in every version of NumPy."""

from typing import Any

import numpy as np
from folders import GOLDEN_FILES

from gpt_xp import GPT2Config

# The logits, losses and gradients of transformers, written by `make_goldens.py`.
GOLDENS = dict(np.load(GOLDEN_FILES / "logits.npz"))

# Sizes are distinct primes where possible, so that swapped axes are found.
CONFIGS = {
    "prime": GPT2Config(n_vocab=101, n_ctx=37, n_embd=39, n_head=3, n_layer=2),
    "one-head": GPT2Config(n_vocab=67, n_ctx=53, n_embd=29, n_head=1, n_layer=3),
    "long": GPT2Config(n_vocab=31, n_ctx=307, n_embd=21, n_head=7, n_layer=1),  # several chunks and sizes of the cache
    "124M-ratios": GPT2Config(n_vocab=211, n_ctx=64, n_embd=96, n_head=12, n_layer=12),
    # Trained GPT-2s have a few dimensions of the residual stream at about 3000, where numbers overflow or lose digits.
    # Random weights alone would not show this.
    "planted": GPT2Config(n_vocab=101, n_ctx=37, n_embd=39, n_head=3, n_layer=3),
    # Attention scores are above 100, so a softmax that does not subtract the maximum overflows.
    "sharp": GPT2Config(n_vocab=101, n_ctx=37, n_embd=39, n_head=3, n_layer=2),
}


def small_params(name: str) -> dict[str, Any]:
    """Return the float64 params of one of `CONFIGS`, which float32 holds exactly."""
    config = CONFIGS[name]
    # RandomState's stream never changes between versions, unlike that of default_rng.
    random = np.random.RandomState(sorted(CONFIGS).index(name) + 1)
    n = config.n_embd

    def weight(*shape: int, scale: float = 0.2) -> np.ndarray:
        # The weights are rounded to float32, so that every dtype has the same ones.
        return (random.standard_normal(shape) * scale).astype(np.float32).astype(np.float64)

    def linear(n_in: int, n_out: int, scale: float = 0.2) -> dict[str, np.ndarray]:
        return {"w": weight(n_in, n_out, scale=scale), "b": weight(n_out)}

    def norm() -> dict[str, np.ndarray]:
        return {"g": 1 + weight(n), "b": weight(n)}

    def block() -> dict[str, Any]:
        return {
            "ln_1": norm(),
            "attn": {"c_attn": linear(n, 3 * n, scale=2.0 if name == "sharp" else 0.2), "c_proj": linear(n, n)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)},
        }

    params = {
        "wte": weight(config.n_vocab, n),
        "wpe": weight(config.n_ctx, n),
        "blocks": [block() for _ in range(config.n_layer)],
        "ln_f": norm(),
    }
    if name == "planted":
        # The first block adds large numbers, and the last subtracts most of them again, as in GPT-2.
        params["blocks"][0]["mlp"]["c_proj"]["b"][[5, 23]] += [3000.0, -2800.0]
        params["blocks"][-1]["mlp"]["c_proj"]["b"][[5, 23]] -= [2900.0, -2750.0]
        for each in params["blocks"]:
            for ln in ("ln_1", "ln_2"):
                each[ln]["g"][[5, 23]] = 0.05
    return params


def small_tokens(name: str, batch: int = 3) -> np.ndarray:
    """Return int32 tokens [batch, n_seq] for one of `CONFIGS`, a little shorter than its context."""
    config = CONFIGS[name]
    random = np.random.RandomState(1000 + sorted(CONFIGS).index(name))
    return random.randint(0, config.n_vocab, size=(batch, config.n_ctx - 6)).astype(np.int32)


def tree_map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    return [tree_map(function, value) for value in tree] if isinstance(tree, list) else function(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found
