"""Kernels that multiply rows by a packed weight.

A packed weight is cut into panels of as many columns as three vectors hold. A panel lies in memory as it is read: all
its columns for the first input, then for the second. A tile of the product, some rows by one panel, stays in registers
while the panel is read once. OpenBLAS copies a weight into such an order at every call; here it is packed at load.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from llvmlite import ir

from gpt_xp.quantization import GROUP
from gpt_xp_backends.native_backend.builder import F16, F32, I8, I16, I32, KernelBuilder
from gpt_xp_backends.native_backend.machine import Target
from gpt_xp_backends.native_backend.value import Value

VECTORS = 3  # vectors in a row of a panel
FEW_ROWS = 4  # Up to so many rows, a weight is widened in registers; for more, a panel is widened in memory first.
BYTES = {"float32": 4, "float16": 2, "int8": 1}


def panel_columns(target: Target) -> int:
    """Return the number of columns of a panel."""
    return VECTORS * target.width


def product(name: str, target: Target, kind: str, few: bool) -> str:
    """Return a kernel that multiplies `few` rows, or more, by a weight of that kind.

    The parts of its work are panels. Its arguments: x and the bytes of its row; rows; the panels, and their scales (0
    without); out and the bytes of its row; inputs; memory for one widened panel of each thread. `out` has whole panels.
    """
    k = KernelBuilder(name, target)
    x, x_row, rows, weight, scales, out, out_row, n_in, memory = k.arguments(9)
    columns = panel_columns(target)
    wide = memory + k.thread * (n_in * (4 * columns))

    def tiles(panel: Value, sizes: Sequence[int], multiply: Callable[[int, Rows, Rows], None]) -> None:
        for size, block in row_blocks(k, rows, sizes):
            with block as row:
                multiply(size, (x + row * x_row, x_row), (out + row * out_row + panel * (4 * columns), out_row))

    with k.shared_loop() as panel:
        if kind == "int4":
            groups = n_in // GROUP
            codes = weight + panel * (groups * (columns * GROUP // 2))
            scale = scales + panel * (groups * (columns * 4))
            if few:
                tiles(panel, (2, 1), lambda n, x, out: _tile_int4(k, n, x, (codes, scale), out, groups))
            else:
                _widen_int4(k, codes, scale, wide, groups)
        else:
            part = weight + panel * (n_in * (columns * BYTES[kind]))
            factors = _scale(k, kind, scales + panel * (4 * columns))
            if few or kind == "float32":
                sizes = (FEW_ROWS, 2, 1) if few else (tile_rows(target), 4, 2, 1)
                tiles(panel, sizes, lambda n, x, out: tile(k, kind, n, x, part, out, n_in, factors))
            else:
                _widen(k, kind, part, wide, n_in, factors)
        if not few and kind != "float32":
            sizes = tile_rows(target), 4, 2, 1
            tiles(panel, sizes, lambda n, x, out: tile(k, "float32", n, x, wide, out, n_in, []))
    return k.text()


def row_blocks(k: KernelBuilder, n: Value, sizes: Sequence[int]) -> Iterator[tuple[int, AbstractContextManager[Value]]]:
    """Yield loops over `n` rows, by blocks of the first size, then of the next for those that are left."""
    begin = k.integer(0)
    for size in sizes:
        end = begin + (n - begin) // size * size
        yield size, k.loop(begin, end, size)
        begin = end


def tile_rows(target: Target) -> int:
    """Return the rows of a tile: with 32 registers, 24 sums, three vectors of the weight and a number of x."""
    return 8 if target.n_registers == 32 else 4


def _scale(k: KernelBuilder, kind: str, scale: Value) -> list[Value]:
    return [k.load(scale + 4 * k.width * c) for c in range(VECTORS)] if kind == "int8" else []


Rows = tuple[Value, Value]  # the address of the first of some rows, and the bytes of a row


def tile(
    k: KernelBuilder, kind: str, n_rows: int, x: Rows, panel: Value, out: Rows, n_in: Value, scale: list[Value]
) -> None:
    """Multiply rows of x by a panel. The scale has a vector for each of its vectors, or is empty."""
    sums = [[k.variable(k.vector(0)) for _ in range(VECTORS)] for _ in range(n_rows)]
    step = BYTES[kind] * k.width
    with k.loop(0, n_in) as i:
        weights = [widened(k, kind, panel + i * (VECTORS * step) + c * step) for c in range(VECTORS)]
        for row, totals in enumerate(sums):
            number = k.splat(k.load(x[0] + row * x[1] + i * 4, F32))
            for total, w in zip(totals, weights, strict=True):
                total.value = k.fma(number, w, total.value)
    for row, totals in enumerate(sums):
        for c, total in enumerate(totals):
            scaled = total.value * scale[c] if scale else total.value
            k.store(scaled, out[0] + row * out[1] + 4 * k.width * c)


def _tile_int4(k: KernelBuilder, n_rows: int, x: Rows, panel: Rows, out: Rows, groups: Value) -> None:
    """Multiply rows of x by a panel of codes. The two codes of a byte have sums of their own, which need not wait."""
    codes, scales = panel
    half, row_bytes = GROUP // 2, VECTORS * k.width
    sums = [[k.variable(k.vector(0)) for _ in range(VECTORS)] for _ in range(n_rows)]
    with k.loop(0, groups) as group:
        inner = [[[k.variable(k.vector(0)) for _ in range(2)] for _ in range(VECTORS)] for _ in range(n_rows)]
        with k.loop(0, half) as i:
            pairs = [_int4_pair(k, codes + (group * half + i) * row_bytes + c * k.width) for c in range(VECTORS)]
            for row, totals in enumerate(inner):
                place = x[0] + row * x[1] + (group * GROUP + i) * 4
                for side, address in enumerate((place, place + 4 * half)):
                    number = k.splat(k.load(address, F32))
                    for total, pair in zip(totals, pairs, strict=True):
                        total[side].value = k.fma(number, pair[side], total[side].value)
        for c in range(VECTORS):
            scale = k.load(scales + (group * VECTORS + c) * (4 * k.width))
            for row in range(n_rows):
                low, high = inner[row][c]
                sums[row][c].value = k.fma(low.value + high.value, scale, sums[row][c].value)
    for row, found in enumerate(sums):
        for c, result in enumerate(found):
            k.store(result.value, out[0] + row * out[1] + 4 * k.width * c)


def _widen(k: KernelBuilder, kind: str, panel: Value, wide: Value, n_in: Value, scale: list[Value]) -> None:
    """Write a panel in float32."""
    step = BYTES[kind] * k.width
    with k.loop(0, n_in * VECTORS, VECTORS) as i:
        for c in range(VECTORS):
            numbers = widened(k, kind, panel + (i + c) * step)
            k.store(numbers * scale[c] if scale else numbers, wide + (i + c) * (4 * k.width))


def _widen_int4(k: KernelBuilder, codes: Value, scales: Value, wide: Value, groups: Value) -> None:
    half, row = GROUP // 2, VECTORS * k.width
    with k.loop(0, groups) as group:
        scale = [k.load(scales + (group * VECTORS + c) * (4 * k.width)) for c in range(VECTORS)]
        with k.loop(0, half) as i:
            for c in range(VECTORS):
                for side, number in enumerate(_int4_pair(k, codes + (group * half + i) * row + c * k.width)):
                    place = group * GROUP + i + side * half
                    k.store(number * scale[c], wide + (place * VECTORS + c) * (4 * k.width))


def _int4_pair(k: KernelBuilder, address: Value) -> tuple[Value, Value]:
    """Load a byte for each column, and return the numbers of the codes in its low and in its high bits."""
    codes = _extended(k, k.load(address, ir.VectorType(I8, k.width)), "zext")
    if k.target.has("avx512f"):  # One instruction looks up 16 numbers in a register, by the low 4 bits of each code.
        table = Value(k, ir.Constant(ir.VectorType(F32, 16), [float(code - 8) for code in range(16)]))
        return k.looked_up(table, codes), k.looked_up(table, codes >> 4)
    return _float(k, (codes & 15) - 8), _float(k, (codes >> 4) - 8)


def widened(k: KernelBuilder, kind: str, address: Value) -> Value:
    """Load a vector of a weight in float32."""
    if kind == "float32":
        return k.load(address)
    if kind == "int8":
        return _float(k, _extended(k, k.load(address, ir.VectorType(I8, k.width)), "sext"))
    if k.target.has_float16:
        half = k.load(address, ir.VectorType(F16, k.width))
        return Value(k, k.ir.fpext(half.ir, ir.VectorType(F32, k.width)))
    # The bits of the exponent and the fraction, as those of a float32, are a number 2^112 times too small.
    bits = _extended(k, k.load(address, ir.VectorType(I16, k.width)), "zext")
    number = ((bits & 0x7FFF) << 13) | ((bits & 0x8000) << 16)
    return Value(k, k.ir.bitcast(number.ir, ir.VectorType(F32, k.width))) * 2.0**112


def _extended(k: KernelBuilder, codes: Value, how: str) -> Value:
    return Value(k, getattr(k.ir, how)(codes.ir, ir.VectorType(I32, k.width)))


def _float(k: KernelBuilder, codes: Value) -> Value:
    kind: Any = ir.VectorType(F32, k.width)
    return Value(k, k.ir.sitofp(codes.ir, kind))
