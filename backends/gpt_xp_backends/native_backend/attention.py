"""Kernels that compute attention: scores, softmax and the mix of values, for each head.

Few queries: each reads the keys and the values once, and the scores stay in the processor's first cache. Many queries:
the keys of a head are packed into panels, and both products are tiles, as those of `products`. Keys that no query of a
block sees are left out.
"""

import math
from collections.abc import Callable

from gpt_xp_backends.native_backend.builder import F32, I32, I64, KernelBuilder
from gpt_xp_backends.native_backend.functions import exp
from gpt_xp_backends.native_backend.machine import Target
from gpt_xp_backends.native_backend.products import VECTORS, panel_columns, row_blocks, tile, tile_rows
from gpt_xp_backends.native_backend.value import Value

MAX_FEW = 5  # Up to so many queries read the keys as they lie. The value is from counted instructions, not measured.
BLOCK = 64  # queries that are computed together
HIDDEN = -1e38  # The mask is below it for a token that the query must not see.


def scratch_bytes(target: Target, n_queries: int, n_slots: int, d_head: int) -> int:
    """Return the bytes of memory that each thread needs."""
    columns = panel_columns(target)
    slots = -(-n_slots // columns) * columns
    n_rows = 1 if n_queries <= MAX_FEW else min(BLOCK, n_queries)
    return 4 * slots * (n_rows + (d_head if n_queries > MAX_FEW else 0))


class _Head:
    """The addresses of one head of one row of the batch, and the numbers that all heads share."""

    def __init__(self, k: KernelBuilder) -> None:
        (q, q_batch, q_head, self.q_row, layer, mask, mask_batch, self.mask_row, out, out_batch, out_head,
         self.out_row, self.n_heads, self.n_queries, self.n_slots, self.memory,
         self.scratch_bytes) = k.arguments(17)  # fmt: skip
        keys, values, kv_head = (k.load(layer + 8 * i, I64) for i in range(3))
        self.scale = k.splat(k.float_argument())
        self._bases = (q, q_batch, q_head), (keys, values, kv_head), (mask, mask_batch), (out, out_batch, out_head)

    def at(self, item: Value) -> None:
        """Take the addresses of a head, which are counted through all rows of the batch."""
        (q, q_batch, q_head), (keys, values, kv_head), (mask, mask_batch), (out, out_batch, out_head) = self._bases
        row, head = item // self.n_heads, item % self.n_heads
        self.q, self.out = q + row * q_batch + head * q_head, out + row * out_batch + head * out_head
        self.keys, self.values, self.mask = keys + item * kv_head, values + item * kv_head, mask + row * mask_batch


def attention(name: str, target: Target, d_head: int, few: bool) -> str:
    """Return a kernel that computes softmax(q * scale @ k.T + mask) @ v for heads of `d_head` numbers.

    Its arguments: q, and the bytes of its batch, head and row; the layer's numbers in the `CacheTable`; mask, and the
    bytes of its batch and row; out, and the bytes of its batch, head and row; heads; queries; slots; memory;
    the bytes of it for each thread; the scale, a float32. A key and a value lie side by side in their head.
    """
    k = KernelBuilder(name, target)
    h = _Head(k)
    memory = h.memory + k.thread * h.scratch_bytes
    if few:
        with k.shared_loop() as item:
            h.at(item)
            with k.loop(0, h.n_queries) as row:
                _one_query(k, h, row, memory, d_head)
    else:
        n_blocks = (h.n_queries + (BLOCK - 1)) // BLOCK
        with k.shared_loop() as item:
            h.at(item // n_blocks)
            first = item % n_blocks * BLOCK
            _many_queries(k, h, first, k.smaller(h.n_queries - first, BLOCK), memory, d_head)
    return k.text()


def _columns(k: KernelBuilder, d_head: int) -> list[Callable[[Value], Value]]:
    """Return a function for each vector of a key or value that loads it from the address of the first number."""

    def load(c: int) -> Callable[[Value], Value]:
        n = d_head - c * k.width
        return lambda address: (k.load if n >= k.width else lambda a: k.load_first(a, n))(address + 4 * k.width * c)

    return [load(c) for c in range(-(-d_head // k.width))]


def _store_columns(k: KernelBuilder, vectors: list[Value], address: Value, d_head: int) -> None:
    for c, vector in enumerate(vectors):
        n = d_head - c * k.width
        if n >= k.width:
            k.store(vector, address + 4 * k.width * c)
        else:
            k.store_first(vector, address + 4 * k.width * c, n)


# --- few queries ---


def _one_query(k: KernelBuilder, h: _Head, row: Value, scores: Value, d_head: int) -> None:
    columns, q, mask = _columns(k, d_head), h.q + row * h.q_row, h.mask + row * h.mask_row
    query = [load(q) * h.scale for load in columns]
    n_keys, largest = _visible(k, mask, h.mask_row, k.integer(1), h.n_slots), k.variable(k.vector(-math.inf))

    def score(first: Value, hidden: Value, last: Value | None) -> None:
        sums = []
        for i in range(k.width):
            key = first + i if last is None else k.smaller(first + i, last)
            address = h.keys + key * (4 * d_head)
            total = query[0] * columns[0](address)
            for part, load in zip(query[1:], columns[1:], strict=True):
                total = k.fma(part, load(address), total)
            sums.append(total)
        found = k.sums(sums) + hidden
        k.store(found, scores + first * 4)
        largest.value = k.larger(largest.value, found)

    whole = n_keys // k.width * k.width
    with k.loop(0, whole, k.width) as first:
        score(first, k.load(mask + first * 4), None)
    with k.when(whole < n_keys):  # The keys after the last one are the last one, with no weight.
        score(whole, k.load_first(mask + whole * 4, n_keys - whole, -math.inf), n_keys - 1)
    total = _exponentials(k, scores, n_keys, k.all_max(largest.value))
    mixed = _mix(k, scores, h.values, n_keys, columns, d_head)
    _store_columns(k, [each / total for each in mixed], h.out + row * h.out_row, d_head)


def _exponentials(k: KernelBuilder, scores: Value, n: Value, largest: Value) -> Value:
    """Replace scores by exp(score - largest), and return a vector of their sum. They fill whole vectors."""
    total = k.variable(k.vector(0))
    with k.loop(0, n, k.width) as first:
        e = exp(k, k.load(scores + first * 4) - largest)
        k.store(e, scores + first * 4)
        total.value = total.value + e
    return k.all_sum(total.value)


def _mix(
    k: KernelBuilder, weights: Value, values: Value, n: Value, columns: list[Callable[[Value], Value]], d_head: int
) -> list[Value]:
    """Return the sum of the values, each times its weight. Four sums of each column do not wait for one another."""
    sums = [[k.variable(k.vector(0)) for _ in columns] for _ in range(4)]
    whole = n // 4 * 4
    for begin, end, some in ((k.integer(0), whole, sums), (whole, n, sums[:1])):
        with k.loop(begin, end, len(some)) as first:
            for place, totals in enumerate(some):
                weight = k.splat(k.load(weights + (first + place) * 4, F32))
                for total, load in zip(totals, columns, strict=True):
                    total.value = k.fma(weight, load(values + (first + place) * (4 * d_head)), total.value)
    a, b, c, d = ([each.value for each in totals] for totals in sums)
    return [(w + x) + (y + z) for w, x, y, z in zip(a, b, c, d, strict=True)]


# --- many queries ---


def _many_queries(k: KernelBuilder, h: _Head, first: Value, n: Value, memory: Value, d_head: int) -> None:
    columns = panel_columns(k.target)
    q, mask, out = h.q + first * h.q_row, h.mask + first * h.mask_row, h.out + first * h.out_row
    n_keys = _visible(k, mask, h.mask_row, n, h.n_slots)
    n_panels = (n_keys + (columns - 1)) // columns
    packed, row_bytes = memory, n_panels * (4 * columns)
    scores = memory + n_panels * (4 * columns * d_head)
    _pack_keys(k, h, n_panels, packed, d_head)
    with k.loop(0, n_panels) as panel:
        part, place = packed + panel * (4 * columns * d_head), scores + panel * (4 * columns)
        for size, block in row_blocks(k, n, (tile_rows(k.target), 4, 2, 1)):
            with block as r:
                tile(k, "float32", size, (q + r * h.q_row, h.q_row), part, (place + r * row_bytes, row_bytes),
                     k.integer(d_head), [h.scale] * VECTORS)  # fmt: skip
    with k.loop(0, n) as row:
        _softmax(k, scores + row * row_bytes, mask + row * h.mask_row, n_keys, n_panels * columns)
    n_vectors = -(-d_head // k.width)
    for begin in range(0, n_vectors, 4):
        count = min(4, n_vectors - begin)
        sizes = (24 // count if k.target.n_registers == 32 else 12 // count, 2, 1)
        for size, block in row_blocks(k, n, sizes):
            with block as r:
                x, to = (scores + r * row_bytes, row_bytes), (out + r * h.out_row, h.out_row)
                _mix_tile(k, size, x, h.values, to, n_keys, (begin, begin + count), d_head)


def _visible(k: KernelBuilder, mask: Value, mask_row: Value, n: Value, n_slots: Value) -> Value:
    """Return how many keys, from the first on, hold all that `n` queries see; at least 1."""
    found = k.variable(k.integer(1))
    with k.loop(0, n_slots, k.width) as first:
        largest, room = k.variable(k.vector(-math.inf)), k.smaller(n_slots - first, k.width)
        with k.loop(0, n) as row:
            largest.value = k.larger(largest.value, k.load_first(mask + row * mask_row + first * 4, room, -math.inf))
        with k.when(k.first(k.all_max(largest.value)) > HIDDEN):
            found.value = first + room
    return found.value


def _pack_keys(k: KernelBuilder, h: _Head, n_panels: Value, packed: Value, d_head: int) -> None:
    """Write keys into panels [d_head, columns]. The keys after the last slot are the last key."""
    columns = panel_columns(k.target)
    last = h.n_slots - 1

    def pack(keys: list[Value], to: Value, first: Value, n: int) -> None:
        """Pack `n` numbers, from `first` on, of some keys."""
        load = k.load if n == k.width else lambda address: k.load_first(address, n)
        for i, vector in enumerate(k.transposed([load(key + first * 4) for key in keys])[:n]):
            k.store(vector, to + (first + i) * (4 * columns))

    whole = d_head // k.width * k.width
    with k.loop(0, n_panels) as panel, k.loop(0, columns, k.width) as column:
        places = (k.smaller(panel * columns + column + i, last) for i in range(k.width))
        keys = [h.keys + place * (4 * d_head) for place in places]
        to = packed + (panel * (d_head * columns) + column) * 4
        with k.loop(0, whole, k.width) as first:
            pack(keys, to, first, k.width)
        if whole < d_head:
            pack(keys, to, k.integer(whole), d_head - whole)


def _softmax(k: KernelBuilder, scores: Value, mask: Value, n_keys: Value, n_padded: Value) -> None:
    largest = k.variable(k.vector(-math.inf))
    with k.loop(0, n_padded, k.width) as first:
        hidden = k.load_first(mask + first * 4, n_keys - first, -math.inf)
        found = k.load(scores + first * 4) + hidden
        k.store(found, scores + first * 4)
        largest.value = k.larger(largest.value, found)
    factor = 1.0 / _exponentials(k, scores, n_padded, k.all_max(largest.value))
    with k.loop(0, n_padded, k.width) as first:
        k.store(k.load(scores + first * 4) * factor, scores + first * 4)


def _mix_tile(
    k: KernelBuilder, n_rows: int, x: tuple[Value, Value], values: Value, out: tuple[Value, Value], n_keys: Value,
    vectors: tuple[int, int], d_head: int,
) -> None:  # fmt: skip
    columns = _columns(k, d_head)[vectors[0] : vectors[1]]
    sums = [[k.variable(k.vector(0)) for _ in columns] for _ in range(n_rows)]
    with k.loop(0, n_keys) as i:
        loaded = [load(values + i * (4 * d_head)) for load in columns]
        for row, totals in enumerate(sums):
            weight = k.splat(k.load(x[0] + row * x[1] + i * 4, F32))
            for total, value in zip(totals, loaded, strict=True):
                total.value = k.fma(weight, value, total.value)
    skipped = vectors[0] * k.width
    for row, totals in enumerate(sums):
        _store_columns(
            k,
            [each.value for each in totals],
            out[0] + row * out[1] + 4 * skipped,
            min(d_head - skipped, len(columns) * k.width),
        )


# --- the cache ---


def put(name: str, target: Target) -> str:
    """Return a kernel that writes the keys and values of new tokens into their slots.

    Its arguments: the layer's numbers in the `CacheTable`; the new keys; the new values; the bytes of their batch, head
    and token; heads; tokens; numbers of a head; slots; the address of the position, an int32.
    """
    k = KernelBuilder(name, target)
    layer, keys, values, batch_bytes, head_bytes, row_bytes = k.arguments(6)
    n_head, n_seq, d_head, n_slots, place = k.arguments(5)
    first = Value(k, k.ir.sext(k.load(place, I32).ir, I64)) % n_slots
    slots_bytes = k.load(layer + 16, I64)
    with k.shared_loop() as item:
        source = item // n_head * batch_bytes + item % n_head * head_bytes
        begin = item * slots_bytes + first * d_head * 4
        for which, new in enumerate((keys, values)):
            slots = k.load(layer + 8 * which, I64) + begin
            with k.loop(0, n_seq) as i, k.loop(0, d_head) as j:
                k.store(k.load(new + source + i * row_bytes + j * 4, F32), slots + (i * d_head + j) * 4)
    return k.text()
