"""Multiply few rows by a matrix. CuPy's own products call cuBLAS, and CuPy lets no CUDA graph capture that.

`thin_matmul` takes arrays of any strides. `split_matmul` is prepared to replace it, and becomes the default when it is
measured on a GPU. It reads 16 bytes at once, and splits the sum, so that enough blocks work on a small matrix.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp_backends.cupy_backend.kernels import TYPES, WIDTH, is_aligned, strides

ROWS = 16  # With more rows, each weight is worth keeping for several of them.

# A block of 32 x 32 threads computes 32 columns of `out`, and each column is summed in 32 parts. The lanes of a warp
# run along the axis of `w` whose numbers lie closer together, so that they read adjacent ones: a plain weight or the
# values of attention along the columns, the token table or the keys along the sum.
SOURCE = r"""
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(1024) thin_product(
    const NUMBER* x, const NUMBER* w, NUMBER* out, int n_in, int n_out, int inner,
    long long x_outer, long long x_inner, long long x_row, long long x_in,
    long long w_outer, long long w_inner, long long w_in, long long w_out, SUM scale)
{
    __shared__ SUM parts[32][33];  // 33: no two lanes share a bank, whichever way they run
    const int lane = threadIdx.x, warp = threadIdx.y;
    const bool along_sum = w_in < w_out;
    const int part = along_sum ? lane : warp, column = along_sum ? warp : lane;
    const long long first = blockIdx.x * 32LL, batch = blockIdx.y;
    x += batch / inner * x_outer + batch % inner * x_inner;
    w += batch / inner * w_outer + batch % inner * w_inner + (first + column) * w_out;

    SUM sums[ROWS] = {};
    if (first + column < n_out) {
        #pragma unroll 4
        for (long long i = part; i < n_in; i += 32) {
            const SUM weight = (SUM)w[i * w_in];
            #pragma unroll
            for (int row = 0; row < ROWS; row++)
                sums[row] += (SUM)x[row * x_row + i * x_in] * weight;
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS; row++) {
        parts[part][column] = sums[row];
        __syncthreads();
        if (warp == 0 && first + lane < n_out) {
            SUM sum = 0;
            for (int i = 0; i < 32; i++)
                sum += parts[i][lane];
            out[(batch * ROWS + row) * n_out + first + lane] = (NUMBER)(sum / scale);
        }
        __syncthreads();
    }
}
"""


# Where the columns of `w` lie side by side. A block of 256 threads computes 32 columns for `length` numbers of the sum:
# LANES threads read 16 bytes each, the columns of one row of `w`, and groups of so many threads share the rows. The
# blocks of one column are told apart by blockIdx.y, and store a part of the sum each: parts[blockIdx.y, row, column].
SPLIT_SOURCE = r"""
#include <cuda_fp16.h>
#define LANES (32 / VECTOR)
#define GROUPS (256 / LANES)

extern "C" __global__ void __launch_bounds__(256) split_product(
    const NUMBER* x, const NUMBER* w, SUM* parts, int n_in, int n_out, int length,
    long long x_row, long long x_in, long long w_in)
{
    __shared__ SUM sums_of[GROUPS][33];
    const int thread = threadIdx.x, lane = thread % LANES, group = thread / LANES;
    const int first = blockIdx.x * 32, column = first + lane * VECTOR;
    const int begin = blockIdx.y * length, end = min(begin + length, n_in);

    SUM sums[ROWS][VECTOR] = {};
    if (column < n_out) {
        #pragma unroll 4
        for (int i = begin + group; i < end; i += GROUPS) {
            __align__(16) NUMBER weights[VECTOR];
            *(uint4*)weights = *(const uint4*)(w + i * w_in + column);
            #pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const SUM number = (SUM)x[row * x_row + i * x_in];
                #pragma unroll
                for (int each = 0; each < VECTOR; each++)
                    sums[row][each] += number * (SUM)weights[each];
            }
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS; row++) {
        #pragma unroll
        for (int each = 0; each < VECTOR; each++)
            sums_of[group][lane * VECTOR + each] = sums[row][each];
        __syncthreads();
        if (thread < 32 && first + thread < n_out) {
            SUM sum = 0;
            for (int i = 0; i < GROUPS; i++)
                sum += sums_of[i][thread];
            parts[((long long)blockIdx.y * ROWS + row) * n_out + first + thread] = sum;
        }
        __syncthreads();
    }
}
"""

# Where the numbers of a sum lie side by side, in `x` and in each column of `w` (the token table, transposed). Each of
# the 8 warps of a block computes one column, and its lanes read 16 bytes at once.
TABLE_SOURCE = r"""
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(256) table_product(
    const NUMBER* x, const NUMBER* w, NUMBER* out, int n_in, int n_out, long long x_row, long long w_out)
{
    const int lane = threadIdx.x % 32, column = blockIdx.x * 8 + threadIdx.x / 32;
    SUM sums[ROWS] = {};
    if (column < n_out) {
        #pragma unroll 4
        for (int i = lane * VECTOR; i < n_in; i += 32 * VECTOR) {
            __align__(16) NUMBER weights[VECTOR], numbers[VECTOR];
            *(uint4*)weights = *(const uint4*)(w + column * w_out + i);
            #pragma unroll
            for (int row = 0; row < ROWS; row++) {
                *(uint4*)numbers = *(const uint4*)(x + row * x_row + i);
                #pragma unroll
                for (int each = 0; each < VECTOR; each++)
                    sums[row] += (SUM)numbers[each] * (SUM)weights[each];
            }
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS; row++) {
        #pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2)
            sums[row] += __shfl_xor_sync(0xffffffff, sums[row], lanes);
        if (lane == 0 && column < n_out)
            out[(long long)row * n_out + column] = (NUMBER)sums[row];
    }
}
"""
BLOCKS = 264  # Two CUDA blocks for each of the 132 multiprocessors of an H100.


def options(dtype: str, rows: int) -> tuple[str, ...]:
    """Return the compiler's options for numbers of that dtype and so many rows."""
    number, total = TYPES[dtype]
    return (f"-DNUMBER={number}", f"-DSUM={total}", f"-DROWS={rows}")


def split_options(dtype: str, rows: int) -> tuple[str, ...]:
    """Return the compiler's options for the kernels that read 16 bytes at once."""
    return (*options(dtype, rows), f"-DVECTOR={WIDTH // np.dtype(dtype).itemsize}")


def thin_matmul(cupy: Any) -> Callable[..., Any]:
    """Return a `matmul(x, w, scale=1.0)`: x / scale [..., rows, n_in] @ w [..., n_in, n_out] -> [..., rows, n_out].

    The kernel is for up to `ROWS` rows, no batch axes or two, equal ones, and any strides; sums are in float32 at
    least. Everything else is left to CuPy's.
    """

    @functools.cache
    def kernel(dtype: str, rows: int) -> Any:
        return cupy.RawKernel(SOURCE, "thin_product", options(dtype, rows))

    def matmul(x: Any, w: Any, scale: float = 1.0) -> Any:
        dtype, (rows, n_in), n_out = str(x.dtype), x.shape[-2:], w.shape[-1]
        batched = x.shape[:-2] == w.shape[:-2] and x.ndim in (2, 4)
        thin = rows <= ROWS and w.shape[-2] == n_in and w.dtype == x.dtype and dtype in TYPES
        if not (batched and thin):
            return cupy.matmul(x if scale == 1 else x / scale, w)
        outer, inner = x.shape[:-2] or (1, 1)
        out = cupy.empty((*x.shape[:-1], n_out), dtype=x.dtype)
        sizes = map(np.int32, (n_in, n_out, inner))
        steps = map(np.int64, (*strides(x), *strides(w)))
        last = np.dtype("float64" if dtype == "float64" else "float32").type(scale)
        kernel(dtype, rows)((-(-n_out // 32), outer * inner), (32, 32), (x, w, out, *sizes, *steps, last))
        return out

    return matmul


def split_matmul(cupy: Any) -> Callable[..., Any]:
    """Return a `matmul` like `thin_matmul`'s, which may return a list of arrays: the product is their sum.

    These are in float32 at least. What is no plain matrix that can be read 16 bytes at once is left to `thin_matmul`.
    """
    thin = thin_matmul(cupy)

    @functools.cache
    def kernel(source: str, name: str, dtype: str, rows: int) -> Any:
        return cupy.RawKernel(source, name, split_options(dtype, rows))

    def matmul(x: Any, w: Any, scale: float = 1.0) -> Any:
        dtype, rows = str(x.dtype), x.shape[0]
        fits = x.ndim == w.ndim == 2 and x.dtype == w.dtype and x.shape[1] == w.shape[0] and dtype in TYPES
        if not fits or rows > ROWS or scale != 1:
            return thin(x, w, scale)
        (n_in, n_out), (x_row, x_in), (w_in, w_out) = w.shape, strides(x)[2:], strides(w)[2:]
        if is_aligned(w):
            n_columns = -(-n_out // 32)
            length = -(-n_in // _n_parts(n_in, n_columns))
            n_parts = -(-n_in // length)
            parts = cupy.empty((n_parts, rows, n_out), dtype="float64" if dtype == "float64" else "float32")
            arguments = (x, w, parts, *map(np.int32, (n_in, n_out, length)), *map(np.int64, (x_row, x_in, w_in)))
            kernel(SPLIT_SOURCE, "split_product", dtype, rows)((n_columns, n_parts), (256, 1), arguments)
            return list(parts)
        if is_aligned(w.T) and is_aligned(x):
            out = cupy.empty((rows, n_out), dtype=x.dtype)
            arguments = (x, w, out, *map(np.int32, (n_in, n_out)), *map(np.int64, (x_row, w_out)))
            kernel(TABLE_SOURCE, "table_product", dtype, rows)((-(-n_out // 8), 1), (256, 1), arguments)
            return out
        return thin(x, w)

    return matmul


def _n_parts(n_in: int, n_columns: int) -> int:
    """Return the number of parts of a sum of `n_in` numbers, for `n_columns` blocks beside each other."""
    return max(min(-(-BLOCKS // n_columns), n_in // 32), 1)
