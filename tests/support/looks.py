"""Looks at models of any shape, with random weights."""

from dataclasses import replace
from typing import Any

import numpy as np

from gpt_xp import GPT2Config, Model
from gpt_xp.inspection.attention import attention_form, last_width, square_of, without_weights
from gpt_xp.inspection.look import left_out, room
from gpt_xp.inspection.results import BINS, LENS_TOP, MAX_SIZE, TOP, Attention, Lens, Look, Predictions


def narrow_model(tokenizer: Any = None, n_head: int = 12, n_layer: int = 12, **sizes: int) -> Model:
    """Return a model of 124M's shape, or another one, but for the width: a look has no array that depends on it."""
    config = GPT2Config(n_embd=2 * n_head, n_head=n_head, n_layer=n_layer, **sizes)
    random, n = np.random.default_rng(7), config.n_embd

    def linear(n_in: int, n_out: int) -> Any:
        return {"w": random.normal(size=(n_in, n_out)), "b": random.normal(size=n_out)}

    def norm() -> Any:
        return {"g": np.ones(n), "b": np.zeros(n)}

    def block() -> Any:
        return {
            "ln_1": norm(), "attn": {"c_attn": linear(n, 3 * n), "c_proj": linear(n, n)},
            "ln_2": norm(), "mlp": {"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)},
        }  # fmt: skip

    params = {
        "wte": random.normal(size=(config.n_vocab, n)), "wpe": random.normal(size=(config.n_ctx, n)),
        "blocks": [block() for _ in range(n_layer)], "ln_f": norm(),
    }  # fmt: skip
    return Model(params, config, tokenizer, "numpy")


def random_look(config: GPT2Config, n_seq: int) -> Look:
    """Return a look with random numbers, as large as that of a model of this shape."""
    random, layers, heads = np.random.default_rng(3), config.n_layer, config.n_head
    first = max(0, n_seq - 64)

    def ids(*shape: int) -> Any:
        return random.integers(0, config.n_vocab, shape).astype(np.int32)

    def logprobs(*shape: int) -> Any:
        return -np.sort(random.exponential(3, shape)).astype(np.float32)

    lens = Lens(
        first, ids(layers + 1, n_seq - first, LENS_TOP), logprobs(layers + 1, n_seq - first, LENS_TOP),
        logprobs(layers + 1, n_seq - first),
    )  # fmt: skip
    all_logits = random.normal(size=config.n_vocab).astype(np.float32)
    best = all_logits.argsort()[: -TOP - 1 : -1].astype(np.int32)
    predictions = Predictions(
        np.tile(best, (n_seq, 1)), np.tile(all_logits[best], (n_seq, 1)),
        np.full((n_seq, BINS), (config.n_vocab - TOP) // BINS), np.tile(np.linspace(-3, 0, BINS), (n_seq, 1)),
        n_seq - 1, all_logits,
    )  # fmt: skip
    found = Look(
        "random", config, None, tuple(map(int, ids(n_seq))), {}, np.append(np.nan, random.exponential(5, n_seq - 1)),
        predictions, lens, without_weights(config, n_seq), made_by={"backend": "random"},
    )  # fmt: skip
    space, n_weights = room(found, MAX_SIZE), n_seq * (n_seq + 1) // 2
    kind, square = attention_form(config, n_seq, space)
    if kind == "uint8" and layers * heads * n_weights > space:  # Random bytes cannot be compressed.
        kind, square = "small", square_of(config, n_seq, space)
    side, last = -(-n_seq // square), random.integers(0, 900, (layers, heads, n_seq))
    shape = (layers, heads, side, side) if kind == "small" else (layers, heads, n_weights)
    weights = random.integers(0, 256, shape).astype(np.uint8)
    attention = Attention(
        kind, weights if kind != "float32" else (weights / 255).astype(np.float32),
        last.astype(np.uint16) if last_width(config, n_seq) == 2 else (last / 65535).astype(np.float32), square,
    )  # fmt: skip
    return replace(found, attention=attention, left_out=tuple(left_out(attention, lens, n_seq)))
