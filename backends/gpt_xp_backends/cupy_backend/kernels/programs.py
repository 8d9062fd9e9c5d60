"""Compute a program (see `gpt_xp_backends.programs`) in one launch: everything between two products of a step.

A block of threads computes a row, of which each thread takes every `THREADS`th column. A reduction computes again what
it needs of each column, from arrays that the GPU's caches still hold, so nothing is stored on the way and read back.
Half precision is computed in float, and rounded where it is stored.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from gpt_xp.types import Array
from gpt_xp_backends.cupy_backend.kernels import TYPES, strides
from gpt_xp_backends.programs import Compute, Operation, Program

NAME = "fused"
THREADS = 256  # a power of two
AXES = ("outer", "middle", "inner", "in")  # the first three number the rows

# C appends {f} to floats and to their functions. One number without it makes a double of all that it is combined with.
SUFFIX = {"float": "f", "double": ""}
FUNCTIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "exp": "exp{f}({})",
    "sqrt": "sqrt{f}({})",
    "tanh": "tanh{f}({})",
    "astype": "{}",
    "max": "{}",  # The maximum of one number. `REDUCTIONS` has that of a row.
    "sum": "{}",
}
# The start of each, and how it makes one number of two. A maximum with NaN is NaN, where `fmax` would leave it out.
REDUCTIONS = {"max": ("-1.0{f} / 0.0{f}", "{0} > {1} || {0} != {0} ? {0} : {1}"), "sum": ("0.0{f}", "{0} + {1}")}


class _Value(NamedTuple):
    """A number that threads compute: of their row, or of the column `i`."""

    type: str
    is_row: bool
    inputs: tuple[int, ...]
    expression: str
    reduction: tuple[str, str] | None = None


# The parameters and the store that write keys and values, the last two thirds of the columns, into the cache.
APPEND = (
    "{0}* k, {0}* v, const int* position, int n_slots, int n_head, int d_head, long long of_batch, long long of_head",
    "if (i >= n / 3) (i < n / 3 * 2 ? k : v)[row * of_batch + i / d_head % n_head * of_head "
    "+ *position % n_slots * d_head + i % d_head] = ({0})v{1};",
)


def source(program: Program, appends: bool = False) -> str:
    """Return a kernel `NAME(sizes, each array given and its strides in numbers, outputs)`.

    One that `appends` has the cache's arrays after them: its one output is the queries, keys and values of a token.
    """
    values = _values(program)
    parameters = ["int n", "int n_middle", "int n_inner"]
    lines = [
        "const int thread = threadIdx.x, row = blockIdx.x;",
        "const int outer = row / n_inner / n_middle, middle = row / n_inner % n_middle, inner = row % n_inner;",
    ]
    for place, (dtype, _) in enumerate(program.given):
        parameters.append(f"const {TYPES[str(dtype)][0]}* __restrict__ a{place}")
        parameters += [f"long long a{place}_{axis}" for axis in AXES]
        lines.append(f"a{place} += outer * a{place}_outer + middle * a{place}_middle + inner * a{place}_inner;")
    for number, value in enumerate(values):
        if value.is_row:
            lines += _of_row(values, number)
    columns, stores = [], []
    for number in program.outputs:
        number_type = TYPES[str(_operation(program, number).dtype)][0]
        parameters.append(f"{number_type}* __restrict__ out{number}")
        if values[number].is_row:
            lines.append(f"if (thread == 0) out{number}[row] = ({number_type})v{number};")
        else:
            columns.append(number)
            stores.append(f"out{number}[(long long)row * n + i] = ({number_type})v{number};")
    if appends:
        [number] = columns
        number_type = TYPES[str(_operation(program, number).dtype)][0]
        parameters.append(APPEND[0].format(number_type))
        stores.append(APPEND[1].format(number_type, number))
    lines += _loop(values, columns, stores) if columns else []
    header = f'extern "C" __global__ void __launch_bounds__({THREADS}) {NAME}'
    text = f"{header}(\n    {', '.join(parameters)})\n{{\n    " + "\n    ".join(lines) + "\n}\n"
    return "#include <cuda_fp16.h>\n" * ("__half" in text) + text


def _values(program: Program) -> list[_Value]:
    values = []
    for place, (dtype, is_row) in enumerate(program.given):
        wide = TYPES[str(dtype)][1]
        values.append(_Value(wide, is_row, (), f"({wide})a{place}[{'0' if is_row else f'i * a{place}_in'}]"))
    for operation in program.operations:
        wide = TYPES[str(operation.dtype)][1]
        inputs = tuple(each for each in operation.inputs if isinstance(each, int))
        operands = [_operand(values, each, wide) for each in operation.inputs]
        reduction = None
        if operation.function in REDUCTIONS and operation.is_row and not values[inputs[0]].is_row:
            start, combined = REDUCTIONS[operation.function]
            reduction = start.format(f=SUFFIX[wide]), combined
        expression = FUNCTIONS[operation.function].format(*operands, f=SUFFIX[wide])
        values.append(_Value(wide, operation.is_row, inputs, expression, reduction))
    return values


def _operand(values: list[_Value], x: int | float, wide: str) -> str:
    if isinstance(x, float):
        return f"{x!r}{SUFFIX[wide]}"
    return f"v{x}" if values[x].type == wide else f"({wide})v{x}"


def _operation(program: Program, number: int) -> Operation:
    return program.operations[number - len(program.given)]


def _of_row(values: list[_Value], number: int) -> list[str]:
    """Compute a value of the row, in every thread."""
    value, name, shared = values[number], f"v{number}", f"shared{number}"
    if value.reduction is None:
        return [_definition(values, number)]
    start, combined = value.reduction
    return [
        f"{value.type} {name} = {start};",
        *_loop(values, value.inputs, [f"{name} = {combined.format(name, f'v{value.inputs[0]}')};"]),
        f"__shared__ {value.type} {shared}[{THREADS}];",  # Each has its own, so that the next one need not wait.
        f"{shared}[thread] = {name};",
        "__syncthreads();",
        f"for (int others = {THREADS} / 2; others > 0; others /= 2) {{",
        "    if (thread < others)",
        f"        {shared}[thread] = {combined.format(f'{shared}[thread]', f'{shared}[thread + others]')};",
        "    __syncthreads();",
        "}",
        f"{name} = {shared}[0];",
    ]


def _loop(values: list[_Value], wanted: Iterable[int], last: list[str]) -> list[str]:
    """Compute the values `wanted` of each column, and then the lines `last`. Several blocks may share the row."""
    needed, visit = set(), list(wanted)
    while visit:
        number = visit.pop()
        if number not in needed and not values[number].is_row:
            needed.add(number)
            visit += values[number].inputs
    return [
        f"for (int i = blockIdx.y * {THREADS} + thread; i < n; i += gridDim.y * {THREADS}) {{",
        *(f"    {_definition(values, number)}" for number in sorted(needed)),
        *(f"    {line}" for line in last),
        "}",
    ]


def _definition(values: list[_Value], number: int) -> str:
    return f"const {values[number].type} v{number} = {values[number].expression};"


def fused(cupy: Any) -> Compute:
    """Return a function that computes programs by one launch each, of arrays of up to four axes."""
    return functools.partial(_compute, cupy, _kernels(cupy), ())


def append(cupy: Any) -> Callable[..., list[Array]]:
    """Return a function that also writes the keys and values of a token into the cache, by the same launch.

    It is prepared, and becomes the default when it is measured on a GPU. Its first three arguments are `k` and `v` of a
    layer, [batch, n_head, n_slots, d_head], of equal strides and with adjacent tokens, and the position [] int32. The
    others are those of `Compute`.
    """
    kernel = _kernels(cupy)

    def compute(k: Array, v: Array, position: Array, *rest: Any) -> list[Array]:
        _, n_head, n_slots, d_head = k.shape
        sizes = map(np.int32, (n_slots, n_head, d_head))
        return _compute(cupy, kernel, (k, v, position, *sizes, *map(np.int64, strides(k)[:2])), *rest)

    return compute


def _kernels(cupy: Any) -> Callable[[Program, bool], Any]:
    @functools.cache
    def kernel(program: Program, appends: bool) -> Any:
        return cupy.RawKernel(source(program, appends), NAME, ())

    return kernel


def _compute(
    cupy: Any,
    kernel: Callable[[Program, bool], Any],
    cache: tuple[Any, ...],
    program: Program,
    arrays: list[Array],
    shape: tuple[int, ...],
    _: frozenset[int],
) -> list[Array]:
    outer, middle, inner, n = (1,) * (4 - len(shape)) + shape
    stored = [_operation(program, number) for number in program.outputs]
    outputs = [cupy.empty((*shape[:-1], 1 if each.is_row else n), dtype=each.dtype) for each in stored]
    reduces = any(each.is_row and each.function in REDUCTIONS for each in program.operations)
    blocks = 1 if reduces else -(-n // THREADS)  # These share a row.
    arguments: list[Any] = [*map(np.int32, (n, middle, inner))]
    for array in arrays:
        arguments += [array, *map(np.int64, strides(array))]
    kernel(program, bool(cache))((outer * middle * inner, blocks), (THREADS, 1), (*arguments, *outputs, *cache))
    return outputs
