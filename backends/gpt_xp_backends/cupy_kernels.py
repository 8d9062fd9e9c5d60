"""Products of few rows, as a CUDA kernel: those of CuPy call cuBLAS, which CuPy lets no CUDA graph capture."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 16  # more are not a thin product: each weight is then worth keeping for several rows

# dtype -> the type of the numbers, and that of their sums
TYPES = {"float16": ("__half", "float"), "float32": ("float", "float"), "float64": ("double", "double")}

# A block of 32 x 32 threads computes 32 columns of `out`, and each column is summed in 32 parts. The lanes of a warp
# run along the axis of `w` whose numbers lie closer together, so that they read adjacent ones: a plain weight or the
# values of attention along the columns, the token table or the keys along the sum.
SOURCE = r"""
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(1024) thin_product(
    const NUMBER* x, const NUMBER* w, NUMBER* out, int n_in, int n_out, int inner,
    long long x_outer, long long x_inner, long long x_row, long long x_in,
    long long w_outer, long long w_inner, long long w_in, long long w_out)
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
            out[(batch * ROWS + row) * n_out + first + lane] = (NUMBER)sum;
        }
        __syncthreads();
    }
}
"""


def options(dtype: str, rows: int) -> tuple[str, ...]:
    """Return the compiler's options for numbers of that dtype and so many rows."""
    number, total = TYPES[dtype]
    return (f"-DNUMBER={number}", f"-DSUM={total}", f"-DROWS={rows}")


def thin_matmul(cupy: Any) -> Callable[[Any, Any], Any]:
    """Return a `matmul` that computes [..., rows, n_in] @ [..., n_in, n_out] -> [..., rows, n_out] by the kernel.

    That is for up to `ROWS` rows, no batch axes or two, equal ones, and any strides; sums are in float32 at least.
    Everything else is left to CuPy's.
    """

    @functools.cache
    def kernel(dtype: str, rows: int) -> Any:
        return cupy.RawKernel(SOURCE, "thin_product", options(dtype, rows))

    def matmul(x: Any, w: Any) -> Any:
        dtype, (rows, n_in), n_out = str(x.dtype), x.shape[-2:], w.shape[-1]
        batched = x.shape[:-2] == w.shape[:-2] and x.ndim in (2, 4)
        thin = rows <= ROWS and w.shape[-2] == n_in and w.dtype == x.dtype and dtype in TYPES
        if not (batched and thin):
            return cupy.matmul(x, w)
        outer, inner = x.shape[:-2] or (1, 1)
        out = cupy.empty((*x.shape[:-1], n_out), dtype=x.dtype)
        sizes = map(np.int32, (n_in, n_out, inner))
        strides = map(np.int64, (*_strides(x), *_strides(w)))
        kernel(dtype, rows)((-(-n_out // 32), outer * inner), (32, 32), (x, w, out, *sizes, *strides))
        return out

    return matmul


def _strides(x: Any) -> list[int]:
    """The strides of a matrix, or a batch of them, in numbers: [outer, inner, row, column]."""
    return [0] * (4 - x.ndim) + [stride // x.itemsize for stride in x.strides]
