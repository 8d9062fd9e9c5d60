"""Products with quantized weights, compiled by Numba, because NumPy has no function for them.

Reading the weights takes most of the time. So each weight is read once, in 8 or 4 bits, and dequantized in a register
or in the processor's first cache. For int8 and for the KV cache, a thread reads at four places far apart, because the
processor prefetches at each of them. The number of rows decides how a product is computed:

- up to `MAX_ROWS_ONE_BY_ONE`, as in decoding: read a row of the weight, and multiply it by each row of x;
- fewer than `MIN_ROWS_FOR_BLAS`: dequantize a tile of the weight, and use each number of it and of x 4 times;
- more, as in prefill: dequantize some columns of the weight, and multiply by them with BLAS. Python threads share the
  columns. BLAS's own threads would spin for a while after each product, and slow down the next step by Numba.

Importing this takes a second. The kernels are compiled once per machine.
"""

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numba
import numpy as np
from numba import njit, prange, types

from gpt_xp.quantization import GROUP, QuantizedWeight, kind_of
from gpt_xp.types import NumpyArray

TILE_ROWS = 4  # rows of x and of the weight in a tile: 16 sums and 8 operands in a processor's 32 registers
TILE_DEPTH = 1024  # numbers of a row of a tile; a tile of x and one of the weight fit the first cache
PLACES = 4  # places of a matrix at which a thread reads in turn; 1.4 times as fast as reading at one place
MAX_ROWS_ONE_BY_ONE = 4  # Up to so many rows of x, the first kind of kernel is the fastest.
MIN_ROWS_FOR_BLAS = 96  # From so many rows of x on, dequantizing for BLAS is the fastest.
MAX_DEQUANTIZED_COLUMNS = 512  # columns that are dequantized for BLAS at a time; fewer take a tenth longer
MIN_SLOTS_FOR_THREADS = 256  # From so many slots of a cache on, threads save more time than starting them takes.
CACHE_LINE = 64  # bytes; operands that begin at a cache line are loaded in half the time

_lock = threading.Lock()  # One of Numba's threading layers ends the process if two threads use it at once.


def product(x: NumpyArray, weight: QuantizedWeight) -> NumpyArray:
    """Return x [rows, n_in] float32 @ weight [n_in, n_out] -> [rows, n_out], with Numba's number of threads."""
    rows, n_out, kind = len(x), len(weight.q), kind_of(weight)
    out = np.empty((rows, n_out), np.float32)
    if rows <= MAX_ROWS_ONE_BY_ONE:
        x = np.ascontiguousarray(x if kind == "int8" else _halves(x))
        _run(_kernel(kind, "few"), x, weight.q, weight.scale, out)
        return out
    if rows < MIN_ROWS_FOR_BLAS:
        sums = np.zeros((_whole_tiles(rows), _whole_tiles(n_out)), np.float32)
        _run(_kernel(kind, "many"), _padded(x), weight.q, weight.scale, sums)
        return sums[:rows, :n_out]
    dequantize = _kernel(kind, "dequantize")  # It is compiled before threads use it.

    def multiply(begin: int, end: int) -> None:
        for first in range(begin, end, MAX_DEQUANTIZED_COLUMNS):
            last = min(first + MAX_DEQUANTIZED_COLUMNS, end)
            wide = np.empty((last - first, x.shape[1]), np.float32)
            dequantize(weight.q[first:last], weight.scale[first:last], wide)
            np.matmul(x, wide.T, out=out[:, first:last])

    n = numba.get_num_threads()  # One part for each thread: with a call for each tile, a prompt of 930 took 1.2 times.
    share(multiply, [(n_out * part // n, n_out * (part + 1) // n) for part in range(n)])
    return out


def share(function: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
    """Call the function with the arguments of each item of `work`, on as many Python threads as Numba has."""
    run = _python_threads(numba.get_num_threads()).submit  # with the caller's context, and its `np.errstate`
    for done in [run(contextvars.copy_context().run, function, *each) for each in work]:
        done.result()


_python_threads = functools.cache(ThreadPoolExecutor)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_python_threads.cache_clear)  # A fork has none of its parent's threads.


def _run(kernel: Callable[..., None], *arguments: Any) -> None:
    with _lock:
        kernel(*arguments, numba.get_num_threads())


def matmul(x: NumpyArray, w: NumpyArray) -> NumpyArray:
    """Return the product of two arrays, such as queries with cached keys, or attention's weights with cached values.

    For one query of each head, Numba's threads read a long cache, because BLAS has one thread and is slower.
    """
    is_query = x.ndim == 4 and x.shape[2] == 1 and x.dtype == w.dtype == np.float32 and x.shape[:2] == w.shape[:2]
    if is_query and max(w.shape[2:]) >= MIN_SLOTS_FOR_THREADS:
        for rows, is_keys in ((w.mT, True), (w, False)):  # [batch, n_head, n_slots, d_head], in the cache's order
            if rows.flags.c_contiguous:
                heads = np.ascontiguousarray(x).reshape(-1, x.shape[3])  # [batch * n_head, d_head or n_slots]
                out = np.empty((len(heads), w.shape[3]), np.float32)
                cached = rows.reshape(len(heads), *rows.shape[2:])
                _run(_attention_kernel(is_keys), heads, cached, rows.shape[2], out)
                return out.reshape(*x.shape[:3], w.shape[3])
    return np.asarray(np.matmul(x, w))


def _whole_tiles(n: int) -> int:
    return -(-n // TILE_ROWS) * TILE_ROWS


def _halves(x: NumpyArray) -> NumpyArray:
    """Return x with the first halves of all groups before the second halves, in the order of low and high bits."""
    return x.reshape(len(x), -1, 2, GROUP // 2).swapaxes(1, 2).reshape(x.shape)


def _padded(x: NumpyArray) -> NumpyArray:
    """Return x padded with rows of zeros to a whole number of tiles, at the beginning of a cache line."""
    rows, n_in = _whole_tiles(len(x)), x.shape[1]
    memory = np.empty(rows * n_in + CACHE_LINE // 4, np.float32)
    begin = -memory.ctypes.data % CACHE_LINE // 4
    padded = memory[begin : begin + rows * n_in].reshape(rows, n_in)
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return padded


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


def _few_int8(x: Any, q: Any, scale: Any, out: Any, n_threads: int) -> None:
    n_out = len(q)
    for thread in prange(n_threads):
        first, last = n_out * thread // n_threads, n_out * (thread + 1) // n_threads
        n = (last - first) // PLACES
        for j in range(first, first + n):
            for row in range(len(x)):
                sums = _dots(x[row], q[j], q[j + n], q[j + 2 * n], q[j + 3 * n])
                for place in range(PLACES):
                    out[row, j + place * n] = sums[place] * scale[j + place * n]
        for j in range(first + PLACES * n, last):
            for row in range(len(x)):
                out[row, j] = _dot(x[row], q[j]) * scale[j]


def _few_int4(x: Any, q: Any, scale: Any, out: Any, n_threads: int) -> None:
    n_out, half = q.shape
    for thread in prange(n_threads):
        each = _aligned(1, half)[0]
        for j in range(n_out * thread // n_threads, n_out * (thread + 1) // n_threads):
            _spread(scale[j], each)
            for row in range(len(x)):
                out[row, j] = _dot_int4(x[row, :half], x[row, half:], q[j], each)


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


def _keys(q: Any, k: Any, n: int, out: Any, n_threads: int) -> None:
    """Multiply each query with the first n keys of its head."""
    n_heads = len(k)
    for thread in prange(n_threads):
        for head in range(n_heads * thread // n_threads, n_heads * (thread + 1) // n_threads):
            rows, m = k[head], n // PLACES
            for slot in range(m):
                sums = _dots(q[head], rows[slot], rows[slot + m], rows[slot + 2 * m], rows[slot + 3 * m])
                for place in range(PLACES):
                    out[head, slot + place * m] = sums[place]
            for slot in range(PLACES * m, n):
                out[head, slot] = _dot(q[head], rows[slot])


def _values(weights: Any, v: Any, n: int, out: Any, n_threads: int) -> None:
    """Sum the first n values of each head by their weights, 4 at a time, so that sums stay in registers longer."""
    n_heads = len(v)
    for thread in prange(n_threads):
        for head in range(n_heads * thread // n_threads, n_heads * (thread + 1) // n_threads):
            total, weight, rows = out[head], weights[head], v[head]
            total[:] = 0
            m = n // PLACES
            for slot in range(m):
                w0, w1, w2, w3 = weight[slot], weight[slot + m], weight[slot + 2 * m], weight[slot + 3 * m]
                v0, v1, v2, v3 = rows[slot], rows[slot + m], rows[slot + 2 * m], rows[slot + 3 * m]
                for i in range(total.size):
                    total[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
            for slot in range(PLACES * m, n):
                for i in range(total.size):
                    total[i] += weight[slot] * rows[slot, i]


def _rows_int8(q: Any, scale: Any, wide: Any) -> None:
    for j in range(len(q)):
        _dequantize_int8(q[j], scale[j], wide[j])


def _rows_int4(q: Any, scale: Any, wide: Any) -> None:
    for j in range(len(q)):
        _dequantize_int4(q[j], scale[j], wide[j])


@functools.cache
def _attention_kernel(is_keys: bool) -> Callable[..., None]:
    rows, cached = types.Array(types.float32, 2, "C"), types.Array(types.float32, 3, "C")
    return _compiled(types.void(rows, cached, types.intp, rows, types.intp), _keys if is_keys else _values)


@functools.cache
def _kernel(kind: str, way: str) -> Callable[..., None]:
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
    return _compiled(types.void(rows, *weight, rows, types.intp), function)


def _compiled(signature: Any, function: Callable[..., None], parallel: bool = True) -> Callable[..., None]:
    """Compile a kernel, or load it from disk if it was compiled before."""
    try:
        return cast(Callable[..., None], njit(signature, parallel=parallel, cache=True, **_FAST)(function))
    except RuntimeError:  # Numba has no folder that it may write to.
        return cast(Callable[..., None], njit(signature, parallel=parallel, **_FAST)(function))
