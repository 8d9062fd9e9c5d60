"""Compute the attention of one query of each head in one CUDA kernel: scores, softmax and the sum of the values.

It is prepared, and becomes the default when it is measured on a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.types import Array
from gpt_xp_backends.cupy_backend.kernels import TYPES, WIDTH, is_aligned, strides

NAME = "attend"
THREADS = 256

# A block computes one head of one row. For the scores, each thread reads whole keys, of every 256th slot; for the
# values, LANES threads read one slot together. Numbers are read 16 bytes at once, and summed in float32 at least.
SOURCE = r"""
#include <cuda_fp16.h>
#define LANES (D_HEAD / VECTOR)
#define GROUPS (256 / LANES)

extern "C" __global__ void __launch_bounds__(256) attend(
    const NUMBER* q, const NUMBER* k, const NUMBER* v, const float* mask, NUMBER* out, int n_head, SUM scale,
    long long q_batch, long long q_head, long long k_batch, long long k_head, long long k_slot,
    long long v_batch, long long v_head, long long v_slot, long long mask_batch, long long mask_slot)
{
    __shared__ SUM query[D_HEAD], weights[SLOTS], shared[256], sums_of[GROUPS][D_HEAD];
    const int thread = threadIdx.x, batch = blockIdx.x / n_head, head = blockIdx.x % n_head;
    q += batch * q_batch + head * q_head;
    k += batch * k_batch + head * k_head;
    v += batch * v_batch + head * v_head;
    mask += batch * mask_batch;
    for (int i = thread; i < D_HEAD; i += 256)
        query[i] = (SUM)q[i] / scale;
    __syncthreads();

    SUM largest = -(SUM)1 / (SUM)0;
    for (int slot = thread; slot < SLOTS; slot += 256) {
        SUM score = 0;
        #pragma unroll
        for (int i = 0; i < D_HEAD; i += VECTOR) {
            __align__(16) NUMBER numbers[VECTOR];
            *(uint4*)numbers = *(const uint4*)(k + slot * k_slot + i);
            #pragma unroll
            for (int each = 0; each < VECTOR; each++)
                score += query[i + each] * (SUM)numbers[each];
        }
        score += (SUM)mask[slot * mask_slot];
        weights[slot] = score;
        largest = score > largest || score != score ? score : largest;
    }
    shared[thread] = largest;
    __syncthreads();
    for (int others = 128; others > 0; others /= 2) {
        if (thread < others && !(shared[thread] >= shared[thread + others]))
            shared[thread] = shared[thread] != shared[thread] ? shared[thread] : shared[thread + others];
        __syncthreads();
    }
    largest = shared[0];
    __syncthreads();

    SUM total = 0;
    for (int slot = thread; slot < SLOTS; slot += 256)
        total += weights[slot] = EXP(weights[slot] - largest);
    shared[thread] = total;
    __syncthreads();
    for (int others = 128; others > 0; others /= 2) {
        if (thread < others)
            shared[thread] += shared[thread + others];
        __syncthreads();
    }
    total = shared[0];

    const int lane = thread % LANES, group = thread / LANES;
    if (group < GROUPS) {
        SUM sums[VECTOR] = {};
        #pragma unroll 4
        for (int slot = group; slot < SLOTS; slot += GROUPS) {
            __align__(16) NUMBER numbers[VECTOR];
            *(uint4*)numbers = *(const uint4*)(v + slot * v_slot + lane * VECTOR);
            #pragma unroll
            for (int each = 0; each < VECTOR; each++)
                sums[each] += weights[slot] * (SUM)numbers[each];
        }
        #pragma unroll
        for (int each = 0; each < VECTOR; each++)
            sums_of[group][lane * VECTOR + each] = sums[each];
    }
    __syncthreads();
    for (int i = thread; i < D_HEAD; i += 256) {
        SUM sum = 0;
        for (int each = 0; each < GROUPS; each++)
            sum += sums_of[each][i];
        out[(long long)blockIdx.x * D_HEAD + i] = (NUMBER)(sum / total);
    }
}
"""
SHARED_BYTES = 36_000  # The weights may take so much of a block's 48 kB.


def options(dtype: str, d_head: int, n_slots: int) -> tuple[str, ...]:
    """Return the compiler's options for numbers of that dtype, heads of that width, and so many slots."""
    number, total = TYPES[dtype]
    exp = "expf" if total == "float" else "exp"
    sizes = f"-DD_HEAD={d_head}", f"-DSLOTS={n_slots}", f"-DVECTOR={WIDTH // np.dtype(dtype).itemsize}"
    return (f"-DNUMBER={number}", f"-DSUM={total}", f"-DEXP={exp}", *sizes)


def attend(cupy: Any) -> Callable[[Array, Array, Array, Array, float], Array | None]:
    """Return a function of softmax(q / scale @ k.T + mask) @ v, which is None for arrays that the kernel cannot read.

    q [batch, n_head, 1, d_head], k and v [batch, n_head, n_slots, d_head], mask [batch or 1, 1, 1, n_slots] float32.
    """

    @functools.cache
    def kernel(dtype: str, d_head: int, n_slots: int) -> Any:
        return cupy.RawKernel(SOURCE, NAME, options(dtype, d_head, n_slots))

    def compute(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array | None:
        if not _fits(q, k, v, mask):
            return None
        (batch, n_head, _, d_head), n_slots = q.shape, k.shape[-2]
        out = cupy.empty(q.shape, dtype=q.dtype)
        of_q, of_k, of_v, of_mask = map(strides, (q, k, v, mask))
        total = np.float64 if str(q.dtype) == "float64" else np.float32
        numbers = (*of_q[:2], *of_k[:3], *of_v[:3], of_mask[0], of_mask[3])
        arguments = (q, k, v, mask, out, np.int32(n_head), total(scale), *map(np.int64, numbers))
        kernel(str(q.dtype), d_head, n_slots)((batch * n_head, 1), (THREADS, 1), arguments)
        return out

    return compute


def _fits(q: Array, k: Array, v: Array, mask: Array) -> bool:
    """Return whether the kernel can read the arrays, and a block has memory for the weights."""
    (*_, n_queries, d_head), n_slots = q.shape, k.shape[-2]
    is_mask = str(mask.dtype) == "float32" and mask.shape[1:] == (1, 1, n_slots)
    fits_block = d_head <= THREADS and n_slots * max(q.itemsize, 4) <= SHARED_BYTES
    return n_queries == 1 and q.strides[-1] == q.itemsize and is_mask and fits_block and is_aligned(k) and is_aligned(v)
