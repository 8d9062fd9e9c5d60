"""Choose the likeliest token of each row in two CUDA kernels and one copy: `sampling.choose` without sampling.

It is prepared, and becomes the default when it is measured on a GPU. CuPy's own functions take 21 launches and three
copies.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.generation.sampling import Choice, clip_margin
from gpt_xp.types import Array
from gpt_xp_backends.cupy_backend.kernels import TYPES

THREADS = 256
BLOCKS = 64  # So many at most share a row in the first kernel. Each finds the best of its part of the vocabulary.

# `part` has for a row and block: the best score, its id, the second score, the largest logit, and the sum of the
# exponentials of all logits over that. Ids that are not allowed have the smallest score, and count in the sum.
SOURCE = r"""
struct Best { NUMBER best, second, largest, total; int id; };

__device__ Best nothing() {
    Best none = {LOWEST, LOWEST, LOWEST, 0, 0x7fffffff};
    return none;
}

// With NaN in one, or infinity, the total is NaN.
__device__ Best both(Best a, Best b) {
    const bool b_wins = b.best > a.best || (b.best == a.best && b.id < a.id);
    Best found = b_wins ? b : a;
    const Best other = b_wins ? a : b;
    found.second = other.best > found.second ? other.best : found.second;
    const NUMBER largest = b.largest > a.largest ? b.largest : a.largest;
    found.total = a.total * EXP(a.largest - largest) + b.total * EXP(b.largest - largest);
    found.largest = largest;
    return found;
}

__device__ Best of_block(Best mine) {
    __shared__ Best shared[256];
    const int thread = threadIdx.x;
    shared[thread] = mine;
    __syncthreads();
    for (int others = 128; others > 0; others /= 2) {
        if (thread < others)
            shared[thread] = both(shared[thread], shared[thread + others]);
        __syncthreads();
    }
    return shared[0];
}

extern "C" __global__ void __launch_bounds__(256) likeliest_of_parts(
    const NUMBER* logits, const bool* allowed, double* parts, int n_vocab, int is_limited, long long row_stride)
{
    const int row = blockIdx.y;
    Best mine = nothing();
    for (int id = blockIdx.x * 256 + threadIdx.x; id < n_vocab; id += gridDim.x * 256) {
        const NUMBER logit = logits[row * row_stride + id];
        const Best one = {is_limited && !allowed[id] ? LOWEST : logit, LOWEST, logit, 1, id};
        mine = both(mine, one);
    }
    mine = of_block(mine);
    if (threadIdx.x == 0) {
        double* part = parts + (row * gridDim.x + blockIdx.x) * 5LL;
        part[0] = mine.best, part[1] = mine.id, part[2] = mine.second, part[3] = mine.largest, part[4] = mine.total;
    }
}

extern "C" __global__ void __launch_bounds__(256) likeliest(const double* parts, double* found, int n_parts)
{
    const int row = blockIdx.x, thread = threadIdx.x;
    Best mine = nothing();
    if (thread < n_parts) {
        const double* part = parts + (row * n_parts + thread) * 5LL;
        const Best one = {(NUMBER)part[0], (NUMBER)part[2], (NUMBER)part[3], (NUMBER)part[4], (int)part[1]};
        mine = one;
    }
    mine = of_block(mine);
    if (thread == 0) {
        found[row * 3] = mine.id;
        found[row * 3 + 1] = mine.best - mine.largest - LOG(mine.total);
        found[row * 3 + 2] = mine.best - mine.second;
    }
}
"""

Greedy = Callable[[Array, "Array | None"], Choice]


def options(dtype: str) -> tuple[str, ...]:
    """Return the compiler's options for logits of that dtype."""
    number = TYPES[dtype][1]
    suffix = "f" if number == "float" else ""
    lowest = float(np.finfo(dtype).min)
    return (f"-DNUMBER={number}", f"-DEXP=exp{suffix}", f"-DLOG=log{suffix}", f"-DLOWEST=({number}){lowest!r}")


def greedy(cupy: Any) -> Greedy:
    """Return `choose(logits, allowed)`, whose `Choice` holds NumPy arrays.

    logits [batch, n_vocab] are float32 or float64, and `allowed` [n_vocab] says which ids have a token.
    """

    @functools.cache
    def kernel(name: str, dtype: str) -> Any:
        return cupy.RawKernel(SOURCE, name, options(dtype))

    def choose(logits: Array, allowed: Array | None) -> Choice:
        dtype, (batch, n_vocab) = str(logits.dtype), logits.shape
        blocks = min(-(-n_vocab // THREADS), BLOCKS)
        parts = cupy.empty((batch, blocks, 5), dtype="float64")
        found = cupy.empty((batch, 3), dtype="float64")
        limits = (logits if allowed is None else allowed), np.int32(n_vocab), np.int32(allowed is not None)
        arguments = (logits, limits[0], parts, *limits[1:], np.int64(logits.strides[0] // logits.itemsize))
        kernel("likeliest_of_parts", dtype)((blocks, batch), (THREADS, 1), arguments)
        kernel("likeliest", dtype)((batch, 1), (THREADS, 1), (parts, found, np.int32(blocks)))
        token, logprob, margin = cupy.asnumpy(found).T
        return Choice(token.astype(np.int64), logprob.astype(dtype), clip_margin(margin.astype(dtype), np))

    return choose
