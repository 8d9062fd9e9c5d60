"""Runs a list of kernels on several threads. All threads meet after each kernel."""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir

from gpt_xp_backends.native_backend.builder import I64, KernelBuilder
from gpt_xp_backends.native_backend.machine import SIGNATURE, Target, kernels, numbers

N_SPINS = 4000  # About 0.1 ms: longer than a thread waits for the others, if each has a core.
_lock = threading.Lock()  # Two runs that take turns on the pool could wait for each other.


def run(calls: "np.ndarray[Any, Any]", n_threads: int) -> None:
    """Run kernels, [n, 2] of the address of each and that of its arguments, one after the other on all threads."""
    arrived = numbers(0)
    arguments = numbers(calls.ctypes.data, len(calls), arrived.ctypes.data, _yield_address())
    kernel = SIGNATURE(kernels().address("run_all", lambda: run_all("run_all", kernels().target)))
    if n_threads == 1:
        kernel(arguments.ctypes.data, 0, 1)
        return
    with _lock:
        others = [_pool(n_threads - 1).submit(kernel, arguments.ctypes.data, i, n_threads) for i in range(1, n_threads)]
        kernel(arguments.ctypes.data, 0, n_threads)
        for each in others:
            each.result()


_pool = functools.cache(ThreadPoolExecutor)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # A fork has none of its parent's threads.


@functools.cache
def _yield_address() -> int:
    """Return the address of the system's function that lets another thread run."""
    library, name = ("kernel32", "SwitchToThread") if sys.platform == "win32" else (None, "sched_yield")
    return int(ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0)


def run_all(name: str, target: Target) -> str:
    """Return a kernel that runs others. Its arguments: their list and number; a count of arrivals; `_yield_address`."""
    k = KernelBuilder(name, target)
    calls, n_calls, arrived, let_others_run = k.arguments(4)
    kernel = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
    count = k.ir.inttoptr(arrived.ir, I64.as_pointer())
    yields = k.ir.inttoptr(let_others_run.ir, ir.FunctionType(ir.IntType(32), []).as_pointer())
    with k.loop(0, n_calls) as i:
        function = k.ir.inttoptr(k.load(calls + i * 16, I64).ir, kernel)
        k.ir.call(function, [k.load(calls + i * 16 + 8, I64).ir, k.thread.ir, k.n_threads.ir])
        all_are_here = (i + 1) * k.n_threads
        k.ir.atomic_rmw("add", count, I64(1), "acq_rel")
        wait, after, spins = k.ir.append_basic_block(), k.ir.append_basic_block(), k.variable(k.integer(0))
        k.ir.branch(wait)
        k.ir.position_at_end(wait)
        spins.value = spins.value + 1
        with k.when(spins.value > N_SPINS):
            k.ir.call(yields, [])
        now = k.ir.load_atomic(count, "acquire", 8)
        k.ir.cbranch(k.ir.icmp_signed("<", now, all_are_here.ir), wait, after)
        k.ir.position_at_end(after)
    return k.text()


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
