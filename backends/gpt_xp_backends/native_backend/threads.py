"""Runs a list of kernels on several threads. All threads meet after each kernel."""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir

from gpt_xp_backends.native_backend.builder import I64, KernelBuilder
from gpt_xp_backends.native_backend.machine import SIGNATURE, Target, kernels, numbers
from gpt_xp_backends.native_backend.value import Value

N_SPINS = 4000  # About 0.1 ms: longer than a thread waits for the others, if each has a core.
LOCK = threading.RLock()  # Two runs that take turns on the pool could wait for each other.


class Calls:
    """Kernels to run one after the other: each by all threads, or by one where it is too small to share."""

    def __init__(self, calls: Sequence[tuple[int, int, bool]]) -> None:
        """Take the address of each kernel, that of its arguments, and whether one thread alone runs it."""
        rounds: list[tuple[int, int, list[tuple[int, int]]]] = [(_address("nothing", nothing), 0, [])]
        for kernel, arguments, alone in calls:
            if alone:
                rounds[-1][2].append((kernel, arguments))
            else:
                rounds.append((kernel, arguments, []))
        self._small = [np.asarray(small, np.int64).reshape(-1, 2) for *_, small in rounds]
        self._rounds = np.asarray(
            [(kernel, arguments, small.ctypes.data, len(small))
             for (kernel, arguments, _), small in zip(rounds, self._small, strict=True)], np.int64,
        )  # fmt: skip

    def run(self, n_threads: int) -> None:
        """Run the kernels. Two Python threads take turns, because two runs on the pool could wait for each other."""
        counts = np.zeros(4 * 8, np.int64)  # Each count has its own line of the processor's cache.
        arguments = numbers(self._rounds.ctypes.data, len(self._rounds), counts.ctypes.data, _yield_address())
        kernel = SIGNATURE(_address("run_all", run_all))
        if n_threads == 1:
            kernel(arguments.ctypes.data, 0, 1, 0)
            return
        with LOCK:
            submit, place = _pool(n_threads - 1).submit, arguments.ctypes.data
            others = [submit(kernel, place, thread, n_threads, 0) for thread in range(1, n_threads)]
            kernel(place, 0, n_threads, 0)
            for each in others:
                each.result()


def _address(name: str, make: Callable[[str, Target], str]) -> int:
    return kernels().address(name, lambda: make(name, kernels().target))


_pool = functools.cache(ThreadPoolExecutor)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # A fork has none of its parent's threads.


@functools.cache
def _yield_address() -> int:
    """Return the address of the system's function that lets another thread run."""
    library, name = ("kernel32", "SwitchToThread") if sys.platform == "win32" else (None, "sched_yield")
    return int(ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0)


def nothing(name: str, target: Target) -> str:
    """Return a kernel that does nothing."""
    return KernelBuilder(name, target).text()


def run_all(name: str, target: Target) -> str:
    """Return the kernel that runs `Calls`. Its arguments: the rounds and their number; four counts; `_yield_address`.

    All threads run the first kernel of a round. The last to finish runs the small ones, and lets the others go on.
    """
    k = KernelBuilder(name, target)
    rounds, n_rounds, counts, yields = k.arguments(4)
    arrived, done = (k.ir.inttoptr((counts + 64 * i).ir, I64.as_pointer()) for i in range(2))
    taken, taken_alone = counts + 128, counts + 192
    kernel = ir.FunctionType(ir.VoidType(), [I64] * 4).as_pointer()
    let_others_run = k.ir.inttoptr(yields.ir, ir.FunctionType(ir.IntType(32), []).as_pointer())

    def call(place: Value, thread: Value, n_threads: Value, taken: Value) -> None:
        function = k.ir.inttoptr(k.load(place, I64).ir, kernel)
        k.ir.call(function, [k.load(place + 8, I64).ir, thread.ir, n_threads.ir, taken.ir])

    with k.loop(0, n_rounds) as i:
        place = rounds + i * 32
        call(place, k.thread, k.n_threads, taken)
        before = Value(k, k.ir.atomic_rmw("add", arrived, I64(1), "acq_rel"))
        is_last = (i + 1) * k.n_threads < before + 2
        with k.ir.if_else(is_last.ir) as (then, otherwise):
            with then:
                with k.loop(0, k.load(place + 24, I64)) as j:
                    k.store(k.integer(0), taken_alone)
                    call(k.load(place + 16, I64) + j * 16, k.integer(0), k.integer(1), taken_alone)
                k.store(k.integer(0), taken)
                k.ir.store_atomic((i + 1).ir, done, "release", 8)
            with otherwise:
                _wait(k, done, i + 1, let_others_run)
    return k.text()


def _wait(k: KernelBuilder, count: Any, number: Value, let_others_run: Any) -> None:
    """Wait until a count reaches the number: first spin, then let other threads run."""
    wait, after = k.ir.append_basic_block(), k.ir.append_basic_block()
    spins = k.variable(k.integer(0))
    k.ir.branch(wait)
    k.ir.position_at_end(wait)
    spins.value = spins.value + 1
    with k.when(spins.value > N_SPINS):
        k.ir.call(let_others_run, [])
    now = Value(k, k.ir.load_atomic(count, "acquire", 8))
    k.ir.cbranch((now < number).ir, wait, after)
    k.ir.position_at_end(after)


def n_cores() -> int:
    """Return the number of cores that this process may use. Two threads on one core would take twice the time."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return len({_core(cpu) for cpu in allowed}) or 1


def _core(cpu: int) -> Sequence[str] | int:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
            return file.read()
    except OSError:
        return cpu
