"""The weights of attention for a page: exact where they fit, else rounded, else as small pictures."""

import math
import zlib
from collections.abc import Iterator

import numpy as np

from gpt_xp.config import GPT2Config
from gpt_xp.inspection.results import Attention
from gpt_xp.model import Model
from gpt_xp.types import NumpyArray

PASS_BYTES = 2**28  # One pass through the model returns so many bytes of weights of attention.
COMPRESSED = 0.6  # zlib leaves 0.8 of the bytes of weights of 64 tokens, and 0.6 of 256 (bundled model)
LARGEST_PICTURE = 64  # A small picture of a head has at most so many squares on a side.


def attention_form(config: GPT2Config, n_seq: int, room: int) -> tuple[str, int]:
    """Return the kind of `Attention` that may fit in `room` bytes, and the `square` of small pictures."""
    n_heads = config.n_layer * config.n_head
    n_weights = n_heads * n_seq * (n_seq + 1) // 2
    if 4 * n_weights <= room:
        return "float32", 1
    if COMPRESSED * n_weights <= room:
        return "uint8", 1
    return "small", square_of(config, n_seq, room)


def square_of(config: GPT2Config, n_seq: int, room: int) -> int:
    """Return the least width of a square of small pictures that fit in `room` bytes."""
    side = math.isqrt(room // (config.n_layer * config.n_head))
    return -(-n_seq // max(1, min(n_seq, LARGEST_PICTURE, side)))


def last_width(config: GPT2Config, n_seq: int) -> int:
    """Return the bytes of a weight of the last token: 4, or 2 where all take more than a megabyte."""
    return 4 if 4 * config.n_layer * config.n_head * n_seq <= 1_000_000 else 2


def without_weights(config: GPT2Config, n_seq: int) -> Attention:
    """Return an `Attention` of zeros, whose pictures have one square for each head."""
    heads = config.n_layer, config.n_head
    last = np.zeros((*heads, n_seq), np.float32 if last_width(config, n_seq) == 4 else np.uint16)
    return Attention("small", np.zeros((*heads, 1, 1), np.uint8), last, n_seq)


def attention_of(model: Model, ids: list[int], room: int) -> Attention:
    """Return the weights of attention of all layers, as exact as `room` bytes allow."""
    kind, square = attention_form(model.config, len(ids), room)
    found = gathered(model, ids, kind, square)
    if kind == "uint8" and len(zlib.compress(found.weights.tobytes())) > room:
        return gathered(model, ids, "small", square_of(model.config, len(ids), room))
    return found


def gathered(model: Model, ids: list[int], kind: str, square: int) -> Attention:
    """Return the `Attention` of that kind, in several passes through the model where the weights are many."""
    weights, last = [], []
    for pattern in patterns(model, ids):  # [n_head, n_seq, n_seq]
        weights.append(coded(pattern, kind, square))
        last.append(pattern[:, -1])
    exact = np.stack(last).astype(np.float32)
    if last_width(model.config, len(ids)) == 2:
        exact = np.rint(65535 * exact).astype(np.uint16)
    return Attention(kind, np.stack(weights), exact, square)


def patterns(model: Model, ids: list[int]) -> Iterator[NumpyArray]:
    """Yield the weights of attention of each layer, [n_head, n_seq, n_seq]."""
    n_layer = model.config.n_layer
    at_a_time = max(1, PASS_BYTES // (4 * model.config.n_head * len(ids) ** 2))
    for first in range(0, n_layer, at_a_time):
        layers = range(first, min(first + at_a_time, n_layer))
        yield from model.trace(ids, [f"blocks.{layer}.attn.hook_pattern" for layer in layers]).values()


def coded(pattern: NumpyArray, kind: str, square: int) -> NumpyArray:
    """Return the weights [n_head, n_seq, n_seq] of a layer as `Attention` of that kind has them."""
    n_head, n_seq, _ = pattern.shape
    if kind == "small":
        side = -(-n_seq // square)
        room = np.zeros((n_head, side * square, side * square), np.float32)
        room[:, :n_seq, :n_seq] = pattern
        return as_bytes(room.reshape(n_head, side, square, side, square).max(axis=(2, 4)))
    triangle = pattern[:, *np.tril_indices(n_seq)]
    return triangle.astype(np.float32) if kind == "float32" else as_bytes(triangle)


def as_bytes(weights: NumpyArray) -> NumpyArray:
    """Return 255 times the square root of each weight, rounded."""
    coded: NumpyArray = np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8)
    return coded
