"""What NumPy computes for many rows, as in prefill: block by block in the processor's cache, on several threads.

NumPy's functions run on one thread, and read and write whole arrays. Here a fused expression (see `fusion`) is computed
for some rows at a time, few enough for the processor's cache and enough that Python between the calls does not count,
and threads take the blocks in turns. Products are split among the same threads, each with a BLAS of one.
"""

import contextvars
import functools
import itertools
import math
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gpt_xp.quantization import QuantizedWeight
from gpt_xp_backends.fusion import Program

NumPyArray: TypeAlias = np.ndarray[Any, Any]

COLUMNS = 512  # of a quantized weight that are widened at a time: with few, BLAS takes a tenth longer
BLOCK = 2**16  # numbers of a block: with half as many, GELU and softmax took 1.1 and 1.4 times as long on two threads

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "astype": lambda x, out: np.copyto(out, x, casting="unsafe"),
    "max": lambda x, out: np.maximum.reduce(x, axis=-1, keepdims=True, out=out),
    "sum": lambda x, out: np.add.reduce(x, axis=-1, keepdims=True, out=out),
}


class Threads:
    """`n` threads, of which the caller is one; the others are started when there is work, and wait without spinning."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._forget()
        if hasattr(os, "register_at_fork"):
            forget = weakref.WeakMethod(self._forget)
            os.register_at_fork(after_in_child=lambda: (found := forget()) and found())

    def __del__(self) -> None:
        for work in self._queues:
            work.put(None)

    def _forget(self) -> None:
        """Begin without threads: none of them lives on in a process that was forked."""
        self._lock = threading.Lock()
        self._queues: list[queue.SimpleQueue[Any]] = []

    def run(self, function: Callable[[int], None]) -> None:
        """Call `function` with 0 .. n - 1, each on a thread of its own, and wait for all; raise what one raises."""
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()  # a new one: Ctrl-C may leave it half read
        with self._lock:
            while len(self._queues) < self.n - 1:
                self._queues.append(queue.SimpleQueue())
                threading.Thread(target=_serve, args=(self._queues[-1],), daemon=True).start()
            for place, work in enumerate(self._queues, 1):
                work.put((contextvars.copy_context(), function, place, done))  # with the caller's np.errstate
            try:
                function(0)
            finally:
                errors = [done.get() for _ in self._queues]
            for error in filter(None, errors):
                raise error

    def take_turns(self, function: Callable[[Any], None], work: list[Any]) -> None:
        """Call `function` with each of `work`, which is used up; whoever is ready takes the next."""

        def part(_: int) -> None:
            while work:
                try:
                    each = work.pop()
                except IndexError:  # another thread took the last
                    return
                function(each)

        self.run(part)


def _serve(work: "queue.SimpleQueue[Any]") -> None:
    while True:
        got = work.get()
        if got is None:  # the pool is gone
            return
        context, function, place, done = got
        error = None
        try:
            context.run(function, place)
        except BaseException as raised:  # whatever it is: the caller raises it
            error = raised
        del context, function, got  # and the arrays that it holds
        done.put(error)
        del done, error


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next arrays of a step, instead of giving it back to the system.

    glibc gives back what is larger than the largest block that was ever freed, up to 32 MB, and the system clears every
    page anew: 7% of the time of a prompt of 512 tokens, where it was measured. Others take no notice of this.
    """
    np.empty(2**25 - 2**16, np.uint8)  # freed at once, and never touched


# For a quantized weight, what writes rows of it into an array of float32: (codes, scales, array [n_out, n_in]).
Widening: TypeAlias = Callable[[QuantizedWeight], Callable[[NumPyArray, NumPyArray, NumPyArray], None]]


def matmul(threads: Threads, widening: Widening | None, x: NumPyArray, w: NumPyArray | QuantizedWeight) -> NumPyArray:
    """Return the product, split among threads: of matrices by columns, of batches of them by heads."""
    if isinstance(w, QuantizedWeight):
        assert widening is not None
        return _quantized_matmul(threads, widening, x, w)
    batch = x.shape[:-2]
    if batch != w.shape[:-2] or min(x.ndim, w.ndim) < 2:  # none of the model's
        return np.asarray(np.matmul(x, w))
    out = np.empty((*batch, x.shape[-2], w.shape[-1]), np.result_type(x, w))

    def part(place: int) -> None:
        if batch:
            heads = _part(batch[-1], place, threads.n)
            np.matmul(x[..., heads, :, :], w[..., heads, :, :], out=out[..., heads, :, :])
        else:
            columns = _part(out.shape[-1], place, threads.n)
            np.matmul(x, w[:, columns], out=out[:, columns])

    threads.run(part)
    return out


def _quantized_matmul(threads: Threads, widening: Widening, x: NumPyArray, w: QuantizedWeight) -> NumPyArray:
    """Widen some columns at a time, and multiply by them while they are in the cache: for many rows the larger part."""
    n_in, n_out = w.shape
    out = np.empty((len(x), n_out), np.float32)
    widen = widening(w)  # compiled before there are threads

    def part(place: int) -> None:
        mine = range(n_out)[_part(n_out, place, threads.n)]
        n_tiles = -(-len(mine) // COLUMNS)
        tiles = [mine[_part(len(mine), number, n_tiles)] for number in range(n_tiles)]
        memory = np.empty((max(map(len, tiles), default=0), n_in), np.float32)
        for tile in tiles:
            columns, wide = slice(tile.start, tile.stop), memory[: len(tile)]
            widen(w.q[columns], w.scale[columns], wide)
            np.matmul(x, wide.T, out=out[:, columns])

    threads.run(part)
    return out


def _part(n: int, place: int, of: int) -> slice:
    return slice(n * place // of, n * (place + 1) // of)


def compute(
    threads: Threads, program: Program, arrays: list[NumPyArray], shape: tuple[int, ...], spare: frozenset[int]
) -> list[NumPyArray]:
    """Compute a fused expression; see `fusion.Compute`."""
    if len(shape) < 2:  # none of the model's
        outputs = compute(threads, program, arrays, (*(1, 1)[len(shape) :], *shape), frozenset())
        return [out.reshape(out.shape[2 - len(shape) :]) for out in outputs]
    plan = _plan(program, spare)
    whole = [np.broadcast_to(each, _of(shape, is_row)) for each, (_, is_row) in zip(arrays, program.given, strict=True)]
    outputs = plan.outputs(arrays, shape)
    n = _rows(shape, threads.n)
    places = itertools.product(*map(range, shape[:-2]))
    blocks = [(*place, slice(first, first + n)) for place in places for first in range(0, shape[-2], n)]

    def block(index: Any) -> None:
        plan.run([array[index] for array in whole], [out[index] for out in outputs], shape[-1])

    threads.take_turns(block, blocks)
    return outputs


def _rows(shape: tuple[int, ...], n_threads: int) -> int:
    """How many rows a block has, so that each thread gets as many blocks as the others."""
    n_blocks = n_threads * -(-math.prod(shape) // (n_threads * BLOCK))
    return min(-(-math.prod(shape[:-1]) // n_blocks), shape[-2])


def _of(shape: tuple[int, ...], is_row: bool) -> tuple[int, ...]:
    return (*shape[:-1], 1) if is_row else shape


class Plan:
    """How a program is run on a block: each value goes into an output, or into a register that several values share."""

    def __init__(self, program: Program, spare: frozenset[int]) -> None:
        self._program = program
        self._first = len(program.given)
        self._last_use = {each: number for number, step in self._numbered() for each in step.inputs}
        self._registers: list[tuple[np.dtype[Any], bool]] = []
        self._steps = [
            (FUNCTIONS[step.function], step.inputs, place)
            for (_, step), place in zip(self._numbered(), self._places(), strict=True)
        ]
        # An output may be written over an array that no later step reads.
        self._reusable = [
            [
                each
                for each in sorted(spare)
                if self._last_use[each] <= value and program.given[each] == self._kind(value)
            ]
            for value in program.outputs
        ]

    def _numbered(self) -> Any:
        return enumerate(self._program.steps, self._first)

    def _kind(self, value: int) -> tuple["np.dtype[Any]", bool]:
        step = self._program.steps[value - self._first]
        return step.dtype, step.is_row

    def _places(self) -> list[int]:
        """Return where the result of each step goes: the number of a register, or -1 - that of an output."""
        places: dict[int, int] = {}
        free: list[int] = []
        for number, step in self._numbered():
            # What is read here for the last time may be overwritten by what is computed from it.
            free += [
                places[each] for each in {*step.inputs} if self._last_use[each] == number and places.get(each, -1) >= 0
            ]
            if number in self._program.outputs:
                places[number] = -1 - self._program.outputs.index(number)
                continue
            fits = [register for register in free if self._registers[register] == self._kind(number)]
            if fits:
                free.remove(fits[-1])
            else:
                self._registers.append(self._kind(number))
            places[number] = fits[-1] if fits else len(self._registers) - 1
        return [*places.values()]

    def outputs(self, arrays: list[NumPyArray], shape: tuple[int, ...]) -> list[NumPyArray]:
        """Return where to write the outputs: over spare arrays, or in new ones."""
        made: list[NumPyArray] = []
        taken: set[int] = set()
        for value, reusable in zip(self._program.outputs, self._reusable, strict=True):
            dtype, is_row = self._kind(value)
            fits = [each for each in reusable if each not in taken and arrays[each].shape == _of(shape, is_row)]
            taken.update(fits[:1])
            made.append(arrays[fits[0]] if fits else np.empty(_of(shape, is_row), dtype))
        return made

    def run(self, values: list[Any], outputs: list[NumPyArray], width: int) -> None:
        """Run all steps on one block of rows of that width, whose given arrays are `values`."""
        n = len(values[0])
        registers = [np.empty((n, 1 if is_row else width), dtype) for dtype, is_row in self._registers]
        for function, inputs, place in self._steps:
            out = registers[place] if place >= 0 else outputs[-1 - place]
            function(*[values[each] if type(each) is int else each for each in inputs], out=out)
            values.append(out)


@functools.lru_cache(maxsize=256)
def _plan(program: Program, spare: frozenset[int]) -> Plan:
    return Plan(program, spare)
