"""Kernels that compute a `Program`: an expression, row by row, with a loop over the row between two reductions."""

import math
from collections.abc import Callable

from gpt_xp_backends.native_backend.builder import F32, KernelBuilder
from gpt_xp_backends.native_backend.functions import exp, tanh
from gpt_xp_backends.native_backend.machine import Target
from gpt_xp_backends.native_backend.value import Value, Variable
from gpt_xp_backends.programs import Operation, Program

REDUCTIONS = ("max", "sum")


def expression(name: str, target: Target, program: Program) -> str:
    """Return a kernel that computes the program.

    The parts of its work are rows. Its arguments: the address of each array, and the bytes of its row, first of those
    given and then of the results; the numbers in a row; memory; the bytes of it for each thread. A row's numbers lie
    side by side.
    """
    k = KernelBuilder(name, target)
    arrays = [k.arguments(2) for _ in range(len(program.given) + len(program.outputs))]
    width, memory, bytes_each = k.arguments(3)
    memory = memory + k.thread * bytes_each
    with k.shared_loop() as row:
        places = [base + row * row_bytes for base, row_bytes in arrays]
        _Row(k, program, places, width, memory).compute()
    return k.text()


def n_kept(program: Program) -> int:
    """Return how many rows of memory the kernel needs."""
    return len(_kept(program))


def _phases(program: Program) -> dict[int, int]:
    """Return the number of reductions on the way to each value: its loop over the row."""
    phase = dict.fromkeys(range(len(program.given)), 0)
    reduced = set()
    for number, operation in _numbered(program):
        inputs = [each for each in operation.inputs if type(each) is int]
        phase[number] = max((phase[each] + (each in reduced) for each in inputs), default=0)
        if operation.function in REDUCTIONS:
            reduced.add(number)
    return phase


def _numbered(program: Program) -> list[tuple[int, Operation]]:
    return list(enumerate(program.operations, len(program.given)))


def _kept(program: Program) -> dict[int, int]:
    """Return the place in memory of each value that a later loop reads, and that is not stored as a result."""
    phase, found = _phases(program), dict[int, int]()
    operations = dict(_numbered(program))
    for number, operation in operations.items():
        for each in operation.inputs:
            if not isinstance(each, int) or each not in operations or operations[each].is_row:
                continue
            if phase[number] > phase[each] and each not in program.outputs:
                found.setdefault(each, len(found))
    return found


class _Row:
    """Computes one row of a program."""

    def __init__(self, k: KernelBuilder, program: Program, places: list[Value], width: Value, memory: Value) -> None:
        self.k, self.program, self.width = k, program, width
        self.operations, self.phase = _numbered(program), _phases(program)
        n_given = len(program.given)
        self.address = dict(enumerate(places[:n_given])) | dict(zip(program.outputs, places[n_given:], strict=True))
        for number, place in _kept(program).items():
            self.address[number] = memory + width * (4 * place)
        # The values with one number for each row, as vectors of it.
        self.row_values = {i: k.splat(k.load(places[i], F32)) for i, (_, is_row) in enumerate(program.given) if is_row}

    def compute(self) -> None:
        """Compute the loops one after the other."""
        for phase in range(max(self.phase.values()) + 1):
            for number, operation in self.operations:
                if operation.is_row and self.phase[number] == phase and operation.function not in REDUCTIONS:
                    self.row_values[number] = self._apply(operation, self.row_values.__getitem__)
            self._loop(phase)
        for number in self.program.outputs:
            if number in self.row_values:
                self.k.store(self.k.first(self.row_values[number]), self.address[number])

    def _loop(self, phase: int) -> None:
        k = self.k
        here = [(number, each) for number, each in self.operations if self.phase[number] == phase]
        reductions = [(number, each) for number, each in here if each.function in REDUCTIONS]
        elements = [(number, each) for number, each in here if not each.is_row and each.function not in REDUCTIONS]
        if not elements and not reductions:
            return
        totals = {number: k.variable(k.vector(_neutral(each))) for number, each in reductions}

        def compute(first: Value, n: Value | None) -> None:
            values: dict[int, Value] = {}

            def value(number: int) -> Value:
                if number in self.row_values:
                    return self.row_values[number]
                if number not in values:
                    address = self.address[number] + first * 4
                    values[number] = k.load(address) if n is None else k.load_first(address, n, 1.0)
                return values[number]

            for number, each in elements:
                values[number] = self._apply(each, value)
                if number in self.address:
                    address = self.address[number] + first * 4
                    k.store(values[number], address) if n is None else k.store_first(values[number], address, n)
            for number, each in reductions:
                self._reduce(totals[number], each, value(int(each.inputs[0])), n)

        whole = self.width // k.width * k.width
        with k.loop(0, whole, k.width) as first:
            compute(first, None)
        with k.when(whole < self.width):
            compute(whole, self.width - whole)
        for number, each in reductions:
            fold = k.all_max if each.function == "max" else k.all_sum
            self.row_values[number] = fold(totals[number].value)

    def _reduce(self, total: Variable, operation: Operation, x: Value, n: Value | None) -> None:
        if n is not None:
            x = self.k.select_first(n, x, _neutral(operation))
        total.value = self.k.larger(total.value, x) if operation.function == "max" else total.value + x

    def _apply(self, operation: Operation, value: Callable[[int], Value]) -> Value:
        k = self.k
        x, *others = [value(each) if type(each) is int else k.vector(each) for each in operation.inputs]
        functions: dict[str, Callable[..., Value]] = {
            "add": lambda y: x + y, "subtract": lambda y: x - y, "multiply": lambda y: x * y, "divide": lambda y: x / y,
            "exp": lambda: exp(k, x), "tanh": lambda: tanh(k, x), "sqrt": lambda: k.sqrt(x), "astype": lambda: x,
        }  # fmt: skip
        return functions[operation.function](*others)


def _neutral(operation: Operation) -> float:
    return -math.inf if operation.function == "max" else 0.0
