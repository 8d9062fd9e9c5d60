"""The kernels of numpy_quantized, compiled by Numba, once per machine.

A thread reads int8 weights and the KV cache at four places far apart, because the processor prefetches at each of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import njit, prange, types

from gpt_xp.quantization import GROUP

TILE_ROWS = 4  # rows of x and of the weight in a tile: 16 sums and 8 operands in a processor's 32 registers
TILE_DEPTH = 1024  # numbers of a row of a tile; a tile of x and one of the weight fit the first cache
PLACES = 4  # places of a matrix at which a thread reads in turn; 1.4 times as fast as reading at one place
LOWEST = np.finfo(np.float32).min  # fastmath allows the compiler to assume that no number is infinite.
CACHE_LINE = 64  # bytes; operands that begin at a cache line are loaded in half the time

_FAST = {"fastmath": True, "boundscheck": False, "nogil": True}  # fastmath allows sums in vector registers.


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], njit(**_FAST)(function))


@_inline
def _aligned(rows: int, columns: int) -> Any:
    memory = np.empty(rows * columns + CACHE_LINE // 4, np.float32)
    begin = -memory.ctypes.data % CACHE_LINE // 4
    return memory[begin : begin + rows * columns].reshape(rows, columns)


@_inline
def _dequantize_int8(codes: Any, scale: Any, wide: Any) -> None:
    """Write a row of a weight, or a part of a row, in float32."""
    for k in range(codes.size):
        wide[k] = np.float32(codes[k]) * scale


@_inline
def _dequantize_int4(codes: Any, scales: Any, wide: Any) -> None:
    for group in range(scales.size):
        pairs = codes[group * GROUP // 2 : (group + 1) * GROUP // 2]
        low = wide[group * GROUP : group * GROUP + GROUP // 2]
        high = wide[group * GROUP + GROUP // 2 : (group + 1) * GROUP]
        for k in range(GROUP // 2):
            low[k] = np.float32(np.int32(pairs[k] & 15) - 8) * scales[group]
        for k in range(GROUP // 2):
            high[k] = np.float32(np.int32(pairs[k] >> 4) - 8) * scales[group]


@_inline
def _dot(x: Any, w: Any) -> Any:
    total = np.float32(0)
    for k in range(w.size):
        total += x[k] * np.float32(w[k])
    return total


@_inline
def _dots(x: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    a = b = c = d = np.float32(0)
    for k in range(x.size):
        a += x[k] * np.float32(w0[k])
        b += x[k] * np.float32(w1[k])
        c += x[k] * np.float32(w2[k])
        d += x[k] * np.float32(w3[k])
    return a, b, c, d


@_inline
def _spread(scales: Any, each: Any) -> None:
    """Write the scale of each group for each of its bytes."""
    for group in range(scales.size):
        part = each[group * GROUP // 2 : (group + 1) * GROUP // 2]
        for k in range(part.size):
            part[k] = scales[group]


@_inline
def _dot_int4(low: Any, high: Any, codes: Any, scale: Any) -> Any:
    """Return the dot product of a row of x, given as two halves, with codes; each byte of codes has a scale."""
    total = np.float32(0)
    for k in range(codes.size):  # int32, because Numba converts int64 to float32 one by one.
        first, second = np.int32((codes[k] & 15) - 8), np.int32((codes[k] >> 4) - 8)
        total += (low[k] * np.float32(first) + high[k] * np.float32(second)) * scale[k]
    return total


@_inline
def _add_tile(x: Any, row: int, first: int, depth: int, wide: Any, out: Any, column: int) -> None:
    """Add to a tile of out the products of 4 rows of x, from column `first` on, with 4 dequantized rows."""
    last = first + depth  # Each row is sliced separately, because Numba knows then that it is contiguous.
    x0, x1, x2, x3 = x[row, first:last], x[row + 1, first:last], x[row + 2, first:last], x[row + 3, first:last]
    w0, w1, w2, w3 = wide[0], wide[1], wide[2], wide[3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for k in range(depth):
        a0 += x0[k] * w0[k]
        a1 += x0[k] * w1[k]
        a2 += x0[k] * w2[k]
        a3 += x0[k] * w3[k]
        b0 += x1[k] * w0[k]
        b1 += x1[k] * w1[k]
        b2 += x1[k] * w2[k]
        b3 += x1[k] * w3[k]
        c0 += x2[k] * w0[k]
        c1 += x2[k] * w1[k]
        c2 += x2[k] * w2[k]
        c3 += x2[k] * w3[k]
        d0 += x3[k] * w0[k]
        d1 += x3[k] * w1[k]
        d2 += x3[k] * w2[k]
        d3 += x3[k] * w3[k]
    for i, sums in enumerate(((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3))):
        for j, total in enumerate(sums):
            out[row + i, column + j] += total


def _few_int8(x: Any, q: Any, scale: Any, bias: Any, out: Any, n_threads: int) -> None:
    n_out = len(q)
    for thread in prange(n_threads):
        first, last = n_out * thread // n_threads, n_out * (thread + 1) // n_threads
        n = (last - first) // PLACES
        for j in range(first, first + n):
            for row in range(len(x)):
                sums = _dots(x[row], q[j], q[j + n], q[j + 2 * n], q[j + 3 * n])
                for place in range(PLACES):
                    out[row, j + place * n] = sums[place] * scale[j + place * n] + bias[j + place * n]
        for j in range(first + PLACES * n, last):
            for row in range(len(x)):
                out[row, j] = _dot(x[row], q[j]) * scale[j] + bias[j]


def _few_int4(x: Any, q: Any, scale: Any, bias: Any, out: Any, n_threads: int) -> None:
    n_out, half = q.shape
    for thread in prange(n_threads):
        each = _aligned(1, half)[0]
        for j in range(n_out * thread // n_threads, n_out * (thread + 1) // n_threads):
            _spread(scale[j], each)
            for row in range(len(x)):
                out[row, j] = _dot_int4(x[row, :half], x[row, half:], q[j], each) + bias[j]


def _many_int8(x: Any, q: Any, scale: Any, out: Any, n_threads: int) -> None:
    n_out, n_in = q.shape
    n_tiles = out.shape[1] // TILE_ROWS
    for thread in prange(n_threads):
        wide = _aligned(TILE_ROWS, TILE_DEPTH)
        for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            j = tile * TILE_ROWS
            for first in range(0, n_in, TILE_DEPTH):
                depth = min(TILE_DEPTH, n_in - first)
                for i in range(min(TILE_ROWS, n_out - j)):  # The sums of padding are not used.
                    _dequantize_int8(q[j + i, first : first + depth], scale[j + i], wide[i])
                for row in range(0, len(x), TILE_ROWS):
                    _add_tile(x, row, first, depth, wide, out, j)


def _many_int4(x: Any, q: Any, scale: Any, out: Any, n_threads: int) -> None:
    n_out, n_in = len(q), x.shape[1]
    n_tiles = out.shape[1] // TILE_ROWS
    for thread in prange(n_threads):
        wide = _aligned(TILE_ROWS, TILE_DEPTH)
        for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            j = tile * TILE_ROWS
            for first in range(0, n_in, TILE_DEPTH):
                depth = min(TILE_DEPTH, n_in - first)
                for i in range(min(TILE_ROWS, n_out - j)):  # The sums of padding are not used.
                    _dequantize_int4(
                        q[j + i, first // 2 : (first + depth) // 2],
                        scale[j + i, first // GROUP : (first + depth) // GROUP],
                        wide[i],
                    )
                for row in range(0, len(x), TILE_ROWS):
                    _add_tile(x, row, first, depth, wide, out, j)


def _attention(q: Any, k: Any, v: Any, mask: Any, out: Any, n_threads: int) -> None:
    """Mix the first values of each head, as many as the mask has slots, by the softmax of their scores.

    Values are summed 4 at a time, so that sums stay in registers longer.
    """
    n_heads, n_slots, factor = len(q), mask.shape[1], np.float32(1 / math.sqrt(q.shape[1]))
    n = n_slots // PLACES
    for thread in prange(n_threads):
        weights = np.empty(n_slots, np.float32)
        for head in range(n_heads * thread // n_threads, n_heads * (thread + 1) // n_threads):
            keys, values, hidden, total = k[head], v[head], mask[head * len(mask) // n_heads], out[head]
            for slot in range(n):
                sums = _dots(q[head], keys[slot], keys[slot + n], keys[slot + 2 * n], keys[slot + 3 * n])
                for place in range(PLACES):
                    weights[slot + place * n] = sums[place]
            for slot in range(PLACES * n, n_slots):
                weights[slot] = _dot(q[head], keys[slot])
            largest = LOWEST
            for slot in range(n_slots):
                weights[slot] = weights[slot] * factor + hidden[slot]
                largest = max(largest, weights[slot])
            scale = np.float32(0)
            for slot in range(n_slots):
                weights[slot] = math.exp(weights[slot] - largest)
                scale += weights[slot]
            total[:] = 0
            for slot in range(n):
                w0, w1, w2, w3 = weights[slot], weights[slot + n], weights[slot + 2 * n], weights[slot + 3 * n]
                v0, v1, v2, v3 = values[slot], values[slot + n], values[slot + 2 * n], values[slot + 3 * n]
                for i in range(total.size):
                    total[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
            for slot in range(PLACES * n, n_slots):
                for i in range(total.size):
                    total[i] += weights[slot] * values[slot, i]
            for i in range(total.size):
                total[i] /= scale


def _layer_norm(x: Any, g: Any, b: Any, eps: Any, out: Any) -> None:
    for row in range(len(x)):
        total = squares = np.float32(0)
        for k in range(g.size):
            total += x[row, k]
        mean = total / np.float32(g.size)
        for k in range(g.size):
            squares += (x[row, k] - mean) * (x[row, k] - mean)
        factor = np.float32(1) / math.sqrt(squares / np.float32(g.size) + eps)
        for k in range(g.size):
            out[row, k] = (x[row, k] - mean) * factor * g[k] + b[k]


def _rows_int8(q: Any, scale: Any, wide: Any) -> None:
    for j in range(len(q)):
        _dequantize_int8(q[j], scale[j], wide[j])


def _rows_int4(q: Any, scale: Any, wide: Any) -> None:
    for j in range(len(q)):
        _dequantize_int4(q[j], scale[j], wide[j])


@functools.cache
def attention_kernel() -> Callable[..., None]:
    """Return the kernel(q, k, v, mask, out, n_threads) that computes `attention` for one query of each head.

    q and out are [batch * n_head, d_head], k and v [batch * n_head, >= n_slots, d_head], mask is [batch, n_slots].
    """
    rows, cached = types.Array(types.float32, 2, "C"), types.Array(types.float32, 3, "C")
    return _compiled(types.void(rows, cached, cached, rows, rows, types.intp), _attention)


@functools.cache
def product_kernel(kind: str, way: str) -> Callable[..., None]:
    """Return the kernel that multiplies "few" or "many" rows by a weight of that kind, or does "dequantize" it."""
    int8: dict[str, Callable[..., None]] = {"few": _few_int8, "many": _many_int8, "dequantize": _rows_int8}
    int4: dict[str, Callable[..., None]] = {"few": _few_int4, "many": _many_int4, "dequantize": _rows_int4}
    function = (int8 if kind == "int8" else int4)[way]
    # Weights that are mapped from a file are read-only. A read-only signature takes writable arrays too.
    codes, n_axes = (types.int8, 1) if kind == "int8" else (types.uint8, 2)
    weight = types.Array(codes, 2, "C", readonly=True), types.Array(types.float32, n_axes, "C", readonly=True)
    rows = types.Array(types.float32, 2, "C")
    if way == "dequantize":
        return _compiled(types.void(*weight, rows), function, parallel=False)
    bias = (types.Array(types.float32, 1, "C", readonly=True),) if way == "few" else ()
    return _compiled(types.void(rows, *weight, *bias, rows, types.intp), function)


@functools.cache
def layer_norm_kernel() -> Callable[..., None]:
    """Return the kernel(x, g, b, eps, out) that normalizes the rows of x [rows, n], on one thread."""
    rows, vector = types.Array(types.float32, 2, "C"), types.Array(types.float32, 1, "C", readonly=True)
    return _compiled(types.void(rows, vector, vector, types.float32, rows), _layer_norm, parallel=False)


def _compiled(signature: Any, function: Callable[..., None], parallel: bool = True) -> Callable[..., None]:
    """Compile a kernel, or load it from disk if it was compiled before."""
    try:
        return cast(Callable[..., None], njit(signature, parallel=parallel, cache=True, **_FAST)(function))
    except RuntimeError:  # Numba has no folder that it may write to.
        return cast(Callable[..., None], njit(signature, parallel=parallel, **_FAST)(function))
