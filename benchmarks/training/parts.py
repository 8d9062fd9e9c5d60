"""Measure the parts of a step of gpt-xp, forward and backward, each compiled and timed alone.

The functions are those of `transformer.py`. Alone, a part reads its inputs from memory and writes its results there,
which the compiler may avoid within a whole step. So the sum of the parts may differ from the step.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gpt_xp import transformer as model
from gpt_xp.benchmark.figures import spread
from gpt_xp.benchmark.report import number
from training import own

STEP = "the whole step"
WARM_UP = 2  # turns: the first compiles, and the second once more, for the state that the first has made


@dataclass
class Part:
    """Some work, and how often a step does it."""

    name: str
    times: int
    work: Callable[[], Any]


def profile(folder: Path, batch: int, rounds: int) -> list[tuple[str, ...]]:
    """Return the table: the median milliseconds of each part, which take turns, and its share of the step."""
    parts = make(folder, batch)
    seconds: dict[str, list[float]] = {part.name: [] for part in parts}
    for turn in range(WARM_UP + rounds):
        for part in parts:
            begin = time.perf_counter()
            jax.block_until_ready(part.work())
            if turn >= WARM_UP:
                seconds[part.name].append(time.perf_counter() - begin)
    table: list[tuple[str, ...]] = [("", "ms", "times", "ms a step", "of the step")]
    for part in parts:
        found, shares = spread(seconds[part.name]), zip(seconds[part.name], seconds[STEP], strict=True)
        share = spread([part.times * mine / whole for mine, whole in shares])
        table.append((
            part.name, f"{number(1e3 * found.median)} ±{(found.high - found.low) / 2 / found.median:.0%}",
            str(part.times), number(1e3 * part.times * found.median), f"{share.median:.0%}",
        ))  # fmt: skip
    return table


def make(folder: Path, batch: int) -> list[Part]:
    """Return the parts of a step on `batch` rows."""
    trainer, own_max = own.Trainer(folder, batch), own.OwnMax(folder, batch)
    config, backend, program = trainer.config, trainer.backend, trainer.program
    xp, n, n_seq, n_layer = program._xp, config.n_embd, config.n_ctx, config.n_layer
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return backend.asarray(rng.standard_normal(shape, dtype=np.float32))

    def both(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Return the function and its gradient as one compiled program, with its arguments."""

        def forward_and_backward(gradient: Any, *args: Any) -> Any:
            out, pull = jax.vjp(function, *args)
            return out, pull(gradient)

        gradient = jax.tree.map(lambda out: random(*out.shape), jax.eval_shape(function, *args))
        return functools.partial(backend.compile(forward_and_backward), gradient, *args)

    tokens = rng.integers(0, config.n_vocab, (batch, n_seq + 1), dtype=np.int32)
    on_device = backend.asarray(tokens)
    rows, positions = on_device[:, :-1].reshape(-1), backend.asarray(np.tile(np.arange(n_seq, dtype=np.int32), batch))
    # Copies: the trainers' own params are given away in their steps.
    params = jax.tree.map(lambda leaf: leaf + 0, trainer.state["params"])
    block = params["blocks"][0]
    x, wide = random(batch * n_seq, n), random(batch * n_seq, 4 * n)
    q, k, v = (random(batch, config.n_head, n_seq, n // config.n_head) for _ in range(3))
    scores = random(batch, config.n_head, n_seq, n_seq)
    visible = np.tri(n_seq, dtype=np.float32)
    mask = backend.asarray(np.finfo(np.float32).min * (1 - visible))

    def linears(attn: Any, mlp: Any, x: Any, wide: Any) -> Any:
        layers = (attn["c_attn"], x), (attn["c_proj"], x), (mlp["c_fc"], x), (mlp["c_proj"], wide)
        return [model.linear(rows, **layer, xp=xp) for layer, rows in layers]

    def loss(params: Any) -> Any:
        return model.lm_loss(params | {"blocks": []}, on_device, config, xp=xp)

    ends = {name: params[name] for name in ("wte", "wpe", "ln_f")}
    of_width_1 = jax.tree.map(lambda leaf: leaf[..., :1], ends)
    return [
        Part(STEP, 1, lambda: trainer.step(tokens)),
        Part("the same, jax.numpy's max", 1, lambda: own_max.step(tokens)),
        Part("- products with weights", n_layer, both(linears, block["attn"], block["mlp"], x, wide)),
        Part("- attention", n_layer, both(lambda q, k, v: model.attention(q, k, v, mask, xp), q, k, v)),
        Part("-- its two products", n_layer, both(
            lambda q, k, weights, v: (q @ xp.matrix_transpose(k), weights @ v), q, k, scores, v)),
        Part("-- its softmax", n_layer, both(lambda scores: model.softmax(scores, xp), scores)),
        Part("-- its softmax, jax.numpy's max", n_layer, both(
            lambda scores: model.softmax(scores, backend.xp), scores)),
        Part("- GELU", n_layer, both(lambda wide: model.gelu(wide, xp), wide)),
        Part("- layer norms", 2 * n_layer, both(
            lambda norm, x: model.layer_norm(x, **norm, xp=xp), block["ln_1"], x)),
        Part("all before and after the blocks", 1, both(loss, ends)),
        Part("- embeddings", 1, both(
            lambda wte, wpe: model.embed(rows, positions, wte, wpe, xp), params["wte"], params["wpe"])),
        Part("- products with the vocabulary", 1, both(
            lambda x, wte: model.unembed(x, wte, xp), x, params["wte"])),
        Part("- loss over the vocabulary, of width 1", 1, both(loss, of_width_1)),
        Part("clipping and AdamW", 1, optimizer(program, params)),
    ]  # fmt: skip


def optimizer(program: Any, params: Any) -> Callable[[], Any]:
    """Return the update of the params from gradients, which are the params themselves."""

    def update(grads: Any, inner: Any, params: Any) -> Any:
        updates, inner = program._optimizer.update(grads, inner, params)
        return optax.apply_updates(params, updates), inner

    return functools.partial(jax.jit(update), params, program._optimizer.init(params), params)
