"""The floor: the matrix products of one step alone, forward and backward, in NumPy or JAX, whichever is faster.

Attention's are over full squares, half of which the mask throws away.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_xp.checkpoint.config_json import read_config

Shape = tuple[int, ...]
TRIALS = 3


def block_products(config: Any, batch: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the shapes of the two factors of each product in a block."""
    n, rows = config.n_embd, batch * config.n_ctx
    heads, d = (batch, config.n_head), n // config.n_head
    yield from [((rows, n), (n, 3 * n)), ((rows, n), (n, n)), ((rows, n), (n, 4 * n)), ((rows, 4 * n), (4 * n, n))]
    yield (*heads, config.n_ctx, d), (*heads, d, config.n_ctx)
    yield (*heads, config.n_ctx, config.n_ctx), (*heads, config.n_ctx, d)


def last_product(config: Any, batch: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the shapes of the factors of the vocabulary's product."""
    yield (batch * config.n_ctx, config.n_embd), (config.n_embd, config.n_vocab)


def operands(shapes: Iterator[tuple[Shape, Shape]]) -> list[Any]:
    """Return (x, w, gradient of x @ w) for each product, float32."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    return [(random(*x), random(*w), random(*x[:-1], w[-1])) for x, w in shapes]


def in_jax(products: list[Any]) -> list[Any]:
    """Return x @ w and the gradients of x and w, of each product."""
    return [(x @ w, dy @ jnp.matrix_transpose(w), jnp.matrix_transpose(x) @ dy) for x, w, dy in products]


def in_numpy(products: list[Any]) -> Callable[[], None]:
    """Return the same as work that writes its results into memory that it has already."""
    work = []
    for x, w, dy in products:
        work += [(x, w, np.empty_like(dy)), (dy, w.swapaxes(-1, -2), np.empty_like(x))]
        work += [(x.swapaxes(-1, -2), dy, np.empty_like(w))]

    def run() -> None:
        for left, right, out in work:
            np.matmul(left, right, out=out)

    return run


class Trainer:
    """Computes the products of a step, and learns nothing."""

    def __init__(self, folder: Path, batch: int) -> None:
        config = read_config(folder)
        block, last = operands(block_products(config, batch)), operands(last_product(config, batch))
        flops = [2 * 3 * dy.size * x.shape[-1] for x, _, dy in [*block * config.n_layer, *last]]
        self.gigaflops = sum(flops) / 1e9
        self.ways = {"NumPy": numpy_way(block, last, config.n_layer), "JAX": jax_way(block, last, config.n_layer)}
        for way in self.ways.values():
            way()  # JAX compiles
        self.chosen = min(self.ways, key=lambda name: min(_seconds(self.ways[name]) for _ in range(TRIALS)))

    def describe(self) -> str:
        """Return in what they are multiplied, and how much that is."""
        return f"{self.gigaflops:.1f} GFLOP a step, in {self.chosen}"

    def step(self, tokens: Any) -> None:
        """Multiply."""
        self.ways[self.chosen]()


def numpy_way(block: list[Any], last: list[Any], n_layer: int) -> Callable[[], None]:
    """Return a step's products in NumPy."""
    of_block, of_last = in_numpy(block), in_numpy(last)

    def run() -> None:
        for _ in range(n_layer):
            of_block()
        of_last()

    return run


def jax_way(block: list[Any], last: list[Any], n_layer: int) -> Callable[[], None]:
    """Return a step's products in JAX, those of a block in one program."""
    multiply = jax.jit(in_jax)
    block, last = jax.device_put((block, last))

    def run() -> None:
        for _ in range(n_layer):  # one after the other, as a model's blocks
            jax.block_until_ready(multiply(block))
        jax.block_until_ready(multiply(last))

    return run


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
