"""Products with quantized weights by the kernels of `numpy_kernels`, because NumPy has no function for them.

Reading the weights takes most of the time. So each weight is read once, in 8 or 4 bits, and dequantized in a register
or in the processor's first cache. The number of rows decides how a product is computed:

- up to `MAX_ROWS_ONE_BY_ONE`, as in decoding: read a row of the weight, and multiply it by each row of x;
- fewer than `MIN_ROWS_FOR_BLAS`: dequantize a tile of the weight, and use each number of it and of x 4 times;
- more, as in prefill: dequantize some columns of the weight, and multiply by them with BLAS. Python threads share the
  columns. BLAS's own threads would spin for a while after each product, and slow down the next step by Numba.

Importing this takes a second.
"""

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numba
import numpy as np

from gpt_xp import transformer
from gpt_xp.parts import replaced_parts
from gpt_xp.quantization import GROUP, QuantizedWeight, kind_of
from gpt_xp.types import Namespace, NumpyArray
from gpt_xp_backends.numpy_backend import with_spare_room
from gpt_xp_backends.numpy_kernels import CACHE_LINE, TILE_ROWS, attention_kernel, layer_norm_kernel, product_kernel

MAX_ROWS_ONE_BY_ONE = 4  # Up to so many rows of x, the first kind of kernel is the fastest.
MIN_ROWS_FOR_BLAS = 96  # From so many rows of x on, dequantizing for BLAS is the fastest.
MAX_DEQUANTIZED_COLUMNS = 512  # columns that are dequantized for BLAS at a time; fewer take a tenth longer
FLOAT32 = np.dtype("float32")

_lock = threading.Lock()  # One of Numba's threading layers ends the process if two threads use it at once.


def product(x: NumpyArray, weight: QuantizedWeight, bias: NumpyArray | None = None) -> NumpyArray:
    """Return x [rows, n_in] float32 @ weight [n_in, n_out] -> [rows, n_out], with Numba's number of threads.

    A bias [n_out] may be given for up to `MAX_ROWS_ONE_BY_ONE` rows.
    """
    rows, n_out, kind = len(x), len(weight.q), kind_of(weight)
    out = np.empty((rows, n_out), np.float32)
    if rows <= MAX_ROWS_ONE_BY_ONE:
        x = np.ascontiguousarray(x if kind == "int8" else _halves(x))
        _run(product_kernel(kind, "few"), x, *weight, _zeros(n_out) if bias is None else bias, out)
        return out
    if rows < MIN_ROWS_FOR_BLAS:
        sums = np.zeros((_whole_tiles(rows), _whole_tiles(n_out)), np.float32)
        _run(product_kernel(kind, "many"), _padded(x), *weight, sums)
        return sums[:rows, :n_out]
    dequantize = product_kernel(kind, "dequantize")  # It is compiled before threads use it.

    def multiply(begin: int, end: int) -> None:
        for first in range(begin, end, MAX_DEQUANTIZED_COLUMNS):
            last = min(first + MAX_DEQUANTIZED_COLUMNS, end)
            wide = np.empty((last - first, x.shape[1]), np.float32)
            dequantize(weight.q[first:last], weight.scale[first:last], wide)
            np.matmul(x, wide.T, out=out[:, first:last])

    n = numba.get_num_threads()  # One part for each thread: with a call for each tile, a prompt of 930 took 1.2 times.
    share(multiply, [(n_out * part // n, n_out * (part + 1) // n) for part in range(n)])
    return out


@functools.cache
def _zeros(n: int) -> NumpyArray:
    return np.zeros(n, np.float32)


def compiled_parts(parts: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return NumPy's `parts` of the model, of which some are computed by kernels here.

    Between the products, a token of 124M at 512 tokens takes 4.3 ms with them, and 5.4 without
    (benchmarks/results/plain-numpy.md).
    """
    in_blocks = parts["attention"]
    return parts | {"linear": linear, "layer_norm": layer_norm, "attention": functools.partial(attention, in_blocks)}


def linear(x: NumpyArray, w: NumpyArray | QuantizedWeight, b: NumpyArray, xp: Namespace) -> NumpyArray:
    """Compute `transformer.linear`: the kernel for few rows adds the bias."""
    if isinstance(w, QuantizedWeight) and len(x) <= MAX_ROWS_ONE_BY_ONE and b.dtype == FLOAT32:
        return product(x, w, np.ascontiguousarray(b))
    return np.asarray(transformer.linear(x, w, b, xp))


def layer_norm(x: NumpyArray, g: NumpyArray, b: NumpyArray, xp: Namespace, eps: float = 1e-5) -> NumpyArray:
    """Compute `transformer.layer_norm`: rows [rows, n_embd] of float32 by one kernel."""
    if not x.shape[1:] == g.shape == b.shape or not x.dtype == g.dtype == b.dtype == FLOAT32:
        return np.asarray(transformer.layer_norm(x, g, b, xp=xp, eps=eps))
    out = np.empty(x.shape, np.float32)
    layer_norm_kernel()(*map(np.ascontiguousarray, (x, g, b)), eps, out)
    return out


def attention(
    in_blocks: Callable[..., NumpyArray], q: NumpyArray, k: NumpyArray, v: NumpyArray, mask: NumpyArray, xp: Namespace
) -> NumpyArray:
    """Compute `transformer.attention`: by one kernel if each head has one query, and otherwise by `in_blocks`."""
    batch, n_head, n_seq, d_head = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    is_cached = k.shape == v.shape == (batch, n_head, mask.shape[-1], d_head) and mask.shape[:-1] == (batch, 1, 1)
    is_plain = is_cached and n_seq == 1 and "softmax" not in replaced_parts(xp)
    if not is_plain or not q.dtype == k.dtype == v.dtype == mask.dtype == FLOAT32:
        return in_blocks(q, k, v, mask, xp)
    queries = np.ascontiguousarray(q).reshape(-1, d_head)
    out = np.empty(queries.shape, np.float32)
    _run(attention_kernel(), queries, _contiguous(k), _contiguous(v), mask.reshape(batch, -1), out)
    return out.reshape(q.shape)


def _contiguous(x: NumpyArray) -> NumpyArray:
    """Return keys or values [batch, n_head, n_slots, d_head] as a contiguous [batch * n_head, >= n_slots, d_head]."""
    return np.ascontiguousarray(with_spare_room(x.reshape(-1, *x.shape[2:])))


@contextlib.contextmanager
def numba_threads(threads: int | None, one_blas_thread: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Use Numba's threads alone. Threads of Numba and BLAS that wait for each other are 100 times as slow."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads or before, numba.config.NUMBA_NUM_THREADS))
    try:
        with one_blas_thread():
            yield
    finally:
        numba.set_num_threads(before)


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
