"""Run a list of kernels on several threads."""

import ctypes
import functools
import itertools
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from gpt_xp_backends.native_backend.builder import I64, KernelBuilder
from gpt_xp_backends.native_backend.machine import SIGNATURE, Target, kernels, numbers
from gpt_xp_backends.native_backend.value import Value

N_SPINS = 4000  # A thread asks for the next work so often before it lets other programs run.
SHARES = 8  # Each thread takes an eighth of its part of a kernel at a time.
LOCK = threading.RLock()  # One step at a time uses the memory that all steps share.


class Call(NamedTuple):
    """A kernel, the address of its arguments, how many parts its work has, and whether one thread does it `alone`."""

    kernel: int
    arguments: int
    n_parts: int
    alone: bool


class Rounds:
    """Kernels that are run one after the other. A round is a kernel for all threads, and the small ones after it.

    The threads take parts of the work, so the calling thread never depends on the others: one that starts late, or not
    at all, has less to do. The last to finish a round runs its small kernels, and begins the next round. `kept` holds
    the memory of the arguments.
    """

    def __init__(self, calls: Sequence[Call], n_threads: int, kept: Any = ()) -> None:
        self._n_threads, self._kept = n_threads, kept
        rounds: list[tuple[Call, list[Call]]] = [(Call(_address("nothing", nothing), 0, 1, False), [])]
        _address("run_rounds", run_rounds)
        for call in calls:
            if call.alone:
                rounds[-1][1].append(call)
            else:
                rounds.append((call, []))
        self._small = [np.asarray([each[:3] for each in small], np.int64).reshape(-1, 3) for _, small in rounds]
        self.table = np.empty((len(rounds), 7), np.int64)
        for row, (call, _), small in zip(self.table, rounds, self._small, strict=True):
            step = call.n_parts if n_threads == 1 else max(1, call.n_parts // (n_threads * SHARES))
            row[:] = *call[:3], step, -(-call.n_parts // step), small.ctypes.data, len(small)

    def run(self) -> None:
        """Run the kernels."""
        job, interrupt = _Job(self), None
        try:
            for _ in range(_workers(self._n_threads - 1)):
                _jobs.put(job)
            job.run(thread=0)
        except KeyboardInterrupt as error:  # The workers may be inside, and the next step writes into the same memory.
            interrupt = error
            job.run(thread=0)
        if interrupt is not None:
            raise interrupt


class _Job:
    """One run of `Rounds`. A worker holds it, so its memory is there until all have left."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._counts = np.zeros(2 * 8, np.int64)  # Each count has its own line of the processor's cache.
        table, counts = rounds.table, self._counts
        self._arguments = numbers(table.ctypes.data, len(table), counts.ctypes.data, _yield_address())
        self._threads = itertools.count(1)

    def run(self, thread: int | None = None) -> None:
        """Take part in the run until all is done."""
        thread = next(self._threads) if thread is None else thread
        SIGNATURE(_address("run_rounds", run_rounds))(self._arguments.ctypes.data, thread, 0, 0)


_jobs: "queue.SimpleQueue[_Job]" = queue.SimpleQueue()
_started: list[threading.Thread] = []


def _workers(n: int) -> int:
    """Return how many workers can take part: `n`, or fewer where the system refuses to start a thread."""
    while len(_started) < n:
        worker = threading.Thread(target=_work, args=(_jobs,), name="gpt-xp native", daemon=True)
        try:
            worker.start()
        except RuntimeError:
            break
        _started.append(worker)
    return min(n, len(_started))


def _work(jobs: "queue.SimpleQueue[_Job]") -> None:
    while True:
        jobs.get().run()


def _forget_threads() -> None:
    """Begin anew in a fork, which has none of its parent's threads, and whose locks may be held by one of them."""
    global LOCK, _jobs
    LOCK, _jobs = threading.RLock(), queue.SimpleQueue()
    _started.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _address(name: str, make: Callable[[str, Target], str]) -> int:
    return kernels().address(name, lambda: make(name, kernels().target))


@functools.cache
def _yield_address() -> int:
    """Return the address of the system's function that lets another thread run."""
    library, name = ("kernel32", "SwitchToThread") if sys.platform == "win32" else (None, "sched_yield")
    return int(ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0)


# --- the kernels that run others --------------------------------------------------------------------------------------


def nothing(name: str, target: Target) -> str:
    """Return a kernel that does nothing."""
    return KernelBuilder(name, target).text()


def run_rounds(name: str, target: Target) -> str:
    """Return the kernel that runs `Rounds`. Its arguments: the table and its length; two counts; `_yield_address`.

    The first count is a ticket: the number of the round in its high 32 bits, of the next share in its low ones. The
    second counts the shares of the round that are done.
    """
    k = KernelBuilder(name, target)
    rounds, n_rounds, counts, yields = k.arguments(4)
    ticket, n_done = (k.ir.inttoptr((counts + 64 * i).ir, I64.as_pointer()) for i in range(2))
    wait, take, work, after = (k.ir.append_basic_block() for _ in range(4))
    k.ir.branch(take)
    k.ir.position_at_end(take)
    taken = Value(k, k.ir.atomic_rmw("add", ticket, I64(1), "acq_rel"))
    number, share = taken >> 32, taken & 0xFFFFFFFF
    going_on = k.ir.append_basic_block()
    k.ir.cbranch((number < n_rounds).ir, going_on, after)
    k.ir.position_at_end(going_on)
    place = rounds + number * 56
    n_parts, step, n_shares = (k.load(place + 8 * i, I64) for i in (2, 3, 4))
    k.ir.cbranch((share < n_shares).ir, work, wait)

    k.ir.position_at_end(work)
    begin = share * step
    _call(k, place, k.thread, begin, k.smaller(begin + step, n_parts))
    before = Value(k, k.ir.atomic_rmw("add", n_done, I64(1), "acq_rel"))
    with k.when(n_shares < before + 2):  # This thread was the last.
        with k.loop(0, k.load(place + 48, I64)) as i:
            small = k.load(place + 40, I64) + i * 24
            _call(k, small, k.integer(0), k.integer(0), k.load(small + 16, I64))
        k.ir.store_atomic(I64(0), n_done, "monotonic", 8)
        k.ir.store_atomic(((number + 1) << 32).ir, ticket, "release", 8)
    k.ir.branch(take)

    k.ir.position_at_end(wait)
    _wait_for_round(k, ticket, number, yields)
    k.ir.branch(take)
    k.ir.position_at_end(after)
    return k.text()


def _call(k: KernelBuilder, place: Value, thread: Value, begin: Value, end: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64] * 4).as_pointer()
    function = k.ir.inttoptr(k.load(place, I64).ir, kind)
    k.ir.call(function, [k.load(place + 8, I64).ir, thread.ir, begin.ir, end.ir])


def _wait_for_round(k: KernelBuilder, ticket: Any, number: Value, yields: Value) -> None:
    """Wait until another round has begun: first spin, then let other threads run."""
    let_others_run = k.ir.inttoptr(yields.ir, ir.FunctionType(ir.IntType(32), []).as_pointer())
    spin, after = k.ir.append_basic_block(), k.ir.append_basic_block()
    spins = k.variable(k.integer(0))
    k.ir.branch(spin)
    k.ir.position_at_end(spin)
    spins.value = spins.value + 1
    k.pause()
    with k.when(spins.value > N_SPINS):
        k.ir.call(let_others_run, [])
    now = Value(k, k.ir.load_atomic(ticket, "acquire", 8)) >> 32
    k.ir.cbranch((now > number).ir, after, spin)
    k.ir.position_at_end(after)


# --- the machine ------------------------------------------------------------------------------------------------------


def n_cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the quota of its container."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = len({_core(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, min(cores, _quota()))


def _core(cpu: int) -> str:
    """Return the processors that share a core. Two threads on one core would take twice the time."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Return how many processors the container may use at a time; very many without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 2**16
