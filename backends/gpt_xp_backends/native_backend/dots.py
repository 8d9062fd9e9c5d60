"""Kernels that multiply rows of int8 codes by a weight of int8 or int4 codes: `--quantize w8a8` and `w4a8`.

The activations are rounded to codes each time anew: with one scale for a row, or for int4 with one for each group, as
the weight has. The instruction (VNNI's vpdpbusd) multiplies unsigned by signed bytes, four neighbours at a time, so one
of the two factors must not be negative. With int8 weights, 128 is added to the codes of the row (now 1 to 255). The
product is then too large by 128 times the sum of the column's codes, so each panel begins with -128 times that sum, and
the total starts from it. With int4 weights, 8 is added to the codes of the weight (0 to 15), and each group of a row
keeps -8 times the sum of its codes for the same purpose.
"""

import math
from collections.abc import Sequence

from llvmlite import ir

from gpt_xp.quantization import GROUP
from gpt_xp_backends.native_backend.builder import F32, I8, I16, I32, KernelBuilder
from gpt_xp_backends.native_backend.machine import Target
from gpt_xp_backends.native_backend.products import VECTORS, Rows, panel_columns, row_blocks, tile_rows
from gpt_xp_backends.native_backend.value import Value

TOGETHER = 4  # codes that are multiplied and added by one instruction
ZERO = 128  # the code that stands for 0 in a row
INT4_ZERO = 8  # the code that stands for 0 in a weight of int4
GROUP_BYTES = 8 + GROUP  # A group of a row has its scale, -8 times the sum of its codes, and its codes.
# The float32 numbers from here to twice as much are whole: adding it rounds to the nearest, ties to even.
WHOLE = 1.5 * 2**23


# --- int8 ---


def row_bytes(target: Target, n_in: int) -> int:
    """Return the bytes of a row of codes: its scale, the codes, and codes of 0 to the end of a vector."""
    return 4 + -(-n_in // target.width) * target.width


def codes(name: str, target: Target) -> str:
    """Return a kernel that rounds rows to codes. The parts of its work are rows.

    Its arguments: x and the bytes of its row; out and the bytes of its row; inputs. A row with a number that is not
    finite gets the scale NaN.
    """
    k = KernelBuilder(name, target)
    x, x_row, out, out_row, n_in = k.arguments(5)
    whole = n_in // k.width * k.width
    with k.shared_loop() as row:
        source, place = x + row * x_row, out + row * out_row
        largest, bad = (k.variable(k.vector(0)) for _ in range(2))

        def look(numbers: Value) -> None:
            largest.value = k.larger(k.larger(numbers, 0.0 - numbers), largest.value)
            bad.value = bad.value + numbers * 0.0

        with k.loop(0, whole, k.width) as i:
            look(k.load(source + i * 4))
        with k.when(whole < n_in):
            look(k.load_first(source + whole * 4, n_in - whole))
        most = k.larger(k.all_max(largest.value), 1e-30)  # A row of zeros is not divided by 0.
        k.store(k.first(most / 127.0 + k.all_sum(bad.value)), place)
        factor = 127.0 / most

        def write(numbers: Value, i: Value) -> None:
            bits = k.ir.bitcast((numbers * factor + (WHOLE + ZERO)).ir, ir.VectorType(I32, k.width))
            k.store(Value(k, k.ir.trunc(bits, ir.VectorType(I8, k.width))), place + 4 + i)

        with k.loop(0, whole, k.width) as i:
            write(k.load(source + i * 4), i)
        with k.when(whole < n_in):
            write(k.load_first(source + whole * 4, n_in - whole), whole)
    return k.text()


def product(name: str, target: Target) -> str:
    """Return a kernel that multiplies rows of codes by a weight.

    The parts of its work are panels. Its arguments: the rows of codes and the bytes of one; rows; the panels, and their
    scales; out and the bytes of its row; inputs, divided by 4.
    """
    k = KernelBuilder(name, target)
    x, x_row, rows, weight, scales, out, out_row, groups = k.arguments(8)
    columns = panel_columns(target)
    with k.shared_loop() as panel:
        part, scale = weight + panel * ((groups + 1) * (4 * columns)), scales + panel * (4 * columns)
        for size, block in row_blocks(k, rows, (tile_rows(target), 4, 2, 1)):
            with block as row:
                _tile(k, size, (x + row * x_row, x_row), part, scale,
                      (out + row * out_row + panel * (4 * columns), out_row), groups)  # fmt: skip
    return k.text()


def _tile(k: KernelBuilder, n_rows: int, x: Rows, panel: Value, scale: Value, out: Rows, groups: Value) -> None:
    whole = ir.VectorType(I32, k.width)
    first = [k.load(panel + 4 * k.width * c, whole) for c in range(VECTORS)]
    sums = [[k.variable(each) for each in first] for _ in range(n_rows)]
    with k.loop(0, groups) as i:
        place = panel + (i + 1) * (4 * k.width * VECTORS)
        weights = [k.load(place + 4 * k.width * c, whole) for c in range(VECTORS)]
        for row, totals in enumerate(sums):
            four = k.splat(k.load(x[0] + row * x[1] + 4 + i * 4, I32))
            for total, w in zip(totals, weights, strict=True):
                total.value = _added(k, total.value, four, w)
    factors = [k.load(scale + 4 * k.width * c) for c in range(VECTORS)]
    for row, totals in enumerate(sums):
        row_scale = k.splat(k.load(x[0] + row * x[1], F32))
        for c, total in enumerate(totals):
            number = Value(k, k.ir.sitofp(total.value.ir, ir.VectorType(F32, k.width)))
            k.store(number * factors[c] * row_scale, out[0] + row * out[1] + 4 * k.width * c)


# --- int4 ---


def group_row_bytes(n_in: int) -> int:
    """Return the bytes of a row of codes that has a scale for each group."""
    return n_in // GROUP * GROUP_BYTES


def group_codes(name: str, target: Target) -> str:
    """Return a kernel that rounds rows to codes, with a scale for each group. The parts of its work are rows.

    A group of a row is its scale, -8 times the sum of its codes as an int32, and the codes. The arguments: x and the
    bytes of its row; out and the bytes of its row; groups. A group with a number that is not finite gets the scale NaN.
    """
    k = KernelBuilder(name, target)
    x, x_row, out, out_row, groups = k.arguments(5)
    with k.shared_loop() as row, k.loop(0, groups) as group:
        source, place = x + row * x_row + group * (4 * GROUP), out + row * out_row + group * GROUP_BYTES
        numbers = [k.load(source + 4 * first) for first in range(0, GROUP, k.width)]
        largest, bad = k.vector(1e-30), k.vector(0)
        for each in numbers:
            largest, bad = k.larger(k.larger(each, 0.0 - each), largest), bad + each * 0.0
        most = k.all_max(largest)
        k.store(k.first(most / 127.0 + k.all_sum(bad)), place)
        total, factor = Value(k, ir.Constant(ir.VectorType(I32, k.width), [0] * k.width)), 127.0 / most
        for i, each in enumerate(numbers):
            bits = k.ir.bitcast((each * factor + WHOLE).ir, ir.VectorType(I32, k.width))
            rounded = k.ir.trunc(bits, ir.VectorType(I8, k.width))
            k.store(Value(k, rounded), place + 8 + i * k.width)
            total = total + Value(k, k.ir.sext(rounded, ir.VectorType(I32, k.width)))
        k.store(k.first(k.all_sum(total) * -INT4_ZERO), place + 4)
    return k.text()


def product_int4(name: str, target: Target) -> str:
    """Return a kernel that multiplies rows of `group_codes` by a weight of int4 codes.

    The parts of its work are panels. Its arguments: the rows of codes and the bytes of one; rows; the panels, and their
    scales; out and the bytes of its row; groups.
    """
    k = KernelBuilder(name, target)
    x, x_row, rows, weight, scales, out, out_row, groups = k.arguments(8)
    columns = panel_columns(target)
    with k.shared_loop() as panel:
        part, scale = weight + panel * (groups * (columns * GROUP // 2)), scales + panel * (groups * (4 * columns))
        for size, block in row_blocks(k, rows, (4, 2, 1)):
            with block as row:
                _tile_int4(k, size, (x + row * x_row, x_row), part, scale,
                           (out + row * out_row + panel * (4 * columns), out_row), groups)  # fmt: skip
    return k.text()


def _tile_int4(k: KernelBuilder, n_rows: int, x: Rows, panel: Value, scale: Value, out: Rows, groups: Value) -> None:
    vector, row_bytes = 4 * k.width, 4 * k.width * VECTORS
    sums = [[k.variable(k.vector(0)) for _ in range(VECTORS)] for _ in range(n_rows)]
    with k.loop(0, groups) as group:
        for c in range(VECTORS):
            place = panel + group * (4 * row_bytes) + c * vector
            pairs = [k.load(place + i * row_bytes, ir.VectorType(I32, k.width)) for i in range(4)]
            halves = [pair & 0x0F0F0F0F for pair in pairs] + [(pair >> 4) & 0x0F0F0F0F for pair in pairs]
            factor = k.load(scale + group * row_bytes + c * vector)
            for row, totals in enumerate(sums):
                codes = x[0] + row * x[1] + group * GROUP_BYTES
                total = k.splat(k.load(codes + 4, I32))
                for i, half in enumerate(halves):
                    total = _added(k, total, half, k.splat(k.load(codes + 8 + 4 * i, I32)))
                number = Value(k, k.ir.sitofp(total.ir, ir.VectorType(F32, k.width)))
                totals[c].value = k.fma(number, factor * k.splat(k.load(codes, F32)), totals[c].value)
    for row, totals in enumerate(sums):
        for c, result in enumerate(totals):
            k.store(result.value, out[0] + row * out[1] + c * vector)


# --- both ---


def _added(k: KernelBuilder, total: Value, unsigned: Value, signed: Value) -> Value:
    """Return a total plus the products of four unsigned with four signed bytes, for each element."""
    if k.target.has_dots:
        return k.dots(total, unsigned, signed)
    n_bytes = TOGETHER * k.width
    pairs = [
        Value(k, getattr(k.ir, how)(k.ir.bitcast(x.ir, ir.VectorType(I8, n_bytes)), ir.VectorType(I16, n_bytes)))
        for x, how in ((unsigned, "zext"), (signed, "sext"))
    ]
    # LLVM makes one instruction of neighbours that are multiplied and added: pmaddwd.
    products = Value(k, k.ir.mul(*(k.ir.sext(x.ir, ir.VectorType(I32, n_bytes)) for x in pairs)))
    for _ in range(int(math.log2(TOGETHER))):
        products = _every_second(k, products, 0) + _every_second(k, products, 1)
    return total + products


def _every_second(k: KernelBuilder, x: Value, first: int) -> Value:
    order: Sequence[int] = range(first, x.ir.type.count, 2)
    return k.shuffle(x, x, order)
