"""Attention of a decode step in two CUDA kernels. Prepared, and not the default before they were measured on a GPU.

`append` adds the bias to the queries, keys and values of a token, and writes keys and values into their slot of the
cache. `attend` computes the attention of one query of each head: scores, softmax and the sum of the values.

`model.py` knows nothing of this. `Attending` is the namespace of `cupy_fusion` that lets products of batches wait: when
it is asked for the product of a softmax with the values, the expression tells whether the whole is attention. And
`AppendingCache` is told by `write` which keys and values the model wants to be in the cache.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace
from gpt_xp_backends.cupy_fusion import Append, strides
from gpt_xp_backends.cupy_kernels import TYPES, WIDTH, is_aligned
from gpt_xp_backends.fusion import Compute, Fusing, Lazy, Node

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

Attend = Callable[[Array, Array, Array, Array, float], "Array | None"]


def options(dtype: str, d_head: int, n_slots: int) -> tuple[str, ...]:
    """Return the compiler's options for numbers of that dtype, heads of that width, and so many slots."""
    number, total = TYPES[dtype]
    exp = "expf" if total == "float" else "exp"
    sizes = f"-DD_HEAD={d_head}", f"-DSLOTS={n_slots}", f"-DVECTOR={WIDTH // np.dtype(dtype).itemsize}"
    return (f"-DNUMBER={number}", f"-DSUM={total}", f"-DEXP={exp}", *sizes)


def attend(cupy: Any) -> Attend:
    """Return what computes softmax(q / scale @ k.T + mask) @ v, or None where the kernel cannot.

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
    """Whether the kernel can read the arrays, and a block has memory for the weights."""
    (*_, n_queries, d_head), n_slots = q.shape, k.shape[-2]
    is_mask = str(mask.dtype) == "float32" and mask.shape[1:] == (1, 1, n_slots)
    fits_block = d_head <= THREADS and n_slots * max(q.itemsize, 4) <= SHARED_BYTES
    return n_queries == 1 and q.strides[-1] == q.itemsize and is_mask and fits_block and is_aligned(k) and is_aligned(v)


@dataclass(frozen=True)
class View:
    """A view of a lazy array, which is made when it is computed. `places` are its numbers' places in the whole."""

    whole: Lazy
    make: Callable[[Any], Any]
    places: "np.ndarray[Any, np.dtype[np.int64]]"
    namespace: "Attending"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the view."""
        return tuple(self.places.shape)

    def then(self, change: Callable[[Any], Any]) -> "View":
        """Return a view of this view."""
        return replace(self, make=lambda whole: change(self.make(whole)), places=change(self.places))

    def __getitem__(self, index: Any) -> Any:
        return self.then(lambda x: x[index])

    def __truediv__(self, other: Any) -> Lazy:
        return self.namespace.lazy("divide", self.namespace.computed(self), other)


class Attending(Fusing):
    """The namespace of a decode step, with `append` and `attend` where these are given.

    `matmul(x, w, scale)` is x / scale @ w.
    """

    def __init__(
        self,
        xp: Namespace,
        matmul: Callable[..., Any],
        compute: Compute,
        append: Append | None = None,
        attend: Attend | None = None,
    ) -> None:
        super().__init__(xp, matmul, compute)
        self._append, self._attend = append, attend

    def computed(self, x: Any) -> Any:
        """Return the array of a lazy one, or of a view, and anything else as it is."""
        return x.make(super().computed(x.whole)) if isinstance(x, View) else super().computed(x)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return the same numbers in another shape; of an expression that is not yet computed a `View`."""
        return self._viewed(x, lambda each: each.reshape(shape))

    def permute_dims(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return the axes in another order; of an expression that is not yet computed a `View`."""
        return self._viewed(x, lambda each: each.transpose(axes))

    def _viewed(self, x: Any, change: Callable[[Any], Any]) -> Any:
        if self._append and isinstance(x, Lazy) and x._node.array is None:
            x = View(x, lambda whole: whole, np.arange(math.prod(x.shape)).reshape(x.shape), self)
        return x.then(change) if isinstance(x, View) else change(self.computed(x))

    def append(self, cache: KVCache, layer: int, k: Any, v: Any) -> bool:
        """Write keys and values of one token into the cache, and return True, where they wait in one expression.

        The expression is the whole of queries, keys and values, [rows, 3 * n_head * d_head].
        """
        if not (self._append and isinstance(k, View) and isinstance(v, View) and k.whole is v.whole):
            return False
        batch, n_head, n_seq, d_head = k.shape
        if k.whole._node.array is not None or (n_seq, k.whole.shape) != (1, (batch, 3 * n_head * d_head)):
            return False
        places = np.arange(math.prod(k.whole.shape)).reshape(batch, 3, n_head, 1, d_head)
        of_layer = cache.k[layer], cache.v[layer]
        if not all(each.flags.c_contiguous and each.dtype == k.whole.dtype for each in of_layer):
            return False
        if not (np.array_equal(k.places, places[:, 1]) and np.array_equal(v.places, places[:, 2])):
            return False
        store = functools.partial(self._append, *of_layer, cache.position)
        self._run(k.whole._node, store)
        return True

    def matmul(self, x: Any, w: Any) -> Lazy:
        """Return the product. One of batches waits, for it may be a part of attention."""
        if len(w.shape) != 4 or not (self._attend or self._append):
            return super().matmul(x, w)
        w = self.computed(w)
        if self._attend and isinstance(x, Lazy) and (heads := self._attention(x._node, w)) is not None:
            return self._private(heads)
        if isinstance(x, View):
            x = self.computed(x)
        node = x._node if isinstance(x, Lazy) else Node(x.shape, x.dtype, array=x)
        product = Node((*node.shape[:-1], w.shape[-1]), node.dtype, "matmul", (node, Node(w.shape, w.dtype, array=w)))
        return Lazy(product, self)

    def _attention(self, weights: Node, v: Array) -> Array | None:
        """Return the attention that the product of such weights with `v` is, or None where it is none."""
        match weights:
            case Node(function="astype", inputs=(Node() as inner,)):
                weights = inner
        match weights:
            case Node(
                function="divide",
                inputs=(
                    Node(
                        function="exp",
                        inputs=(Node(function="subtract", inputs=(scores, Node(function="max", inputs=(same,)))),),
                    ) as numerator,
                    Node(function="sum", inputs=(summed,)),
                ),
            ) if summed is numerator and same is scores:
                pass
            case _:
                return None
        match scores:
            case Node(function="add", inputs=(Node(function="matmul", array=None) as product, Node() as mask)):
                query, keys = product.inputs
                q, scale = _undivided(query)
                if q.array is not None and mask.array is not None and self._attend:
                    return self._attend(q.array, keys.array.swapaxes(-1, -2), v, mask.array, scale)
        return None

    def _run(self, root: Node, compute: Compute | None = None) -> None:
        """Compute a node, and before it the products below it that still wait."""
        for node in dict.fromkeys(_waiting(root, [])):
            x, w = node.inputs
            q, scale = _undivided(x)
            if q.array is None:
                q, scale = x, 1.0
            node.array, node.inputs = self._matmul(self.computed(Lazy(q, self)), w.array, scale), ()
        if root.array is None:
            super()._run(root, compute)


def _undivided(node: Node) -> tuple[Node, float]:
    """Return the dividend and the divisor of a division by a number that is not computed, and of all else 1."""
    match node:
        case Node(function="divide", array=None, inputs=(Node() as dividend, float() as divisor)):
            return dividend, divisor
    return node, 1.0


def _waiting(node: Node, found: list[Node]) -> list[Node]:
    """Return the products below a node that are not computed."""
    if node.array is None and node.function == "matmul":
        found.append(node)
    elif node.array is None:
        for each in node.inputs:
            if isinstance(each, Node):
                _waiting(each, found)
    return found


class AppendingCache(KVCache):
    """The cache of a step that is captured: where it can be, keys and values are written by one kernel."""

    def write(self, layer: int, k: Any, v: Any, xp: Namespace) -> KVCache:
        """Put the keys and values [batch, n_head, 1, d_head] of the next token into one layer."""
        if xp.append(self, layer, k, v):
            return self
        return super().write(layer, xp.computed(k), xp.computed(v), xp)
