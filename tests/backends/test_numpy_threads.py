"""The threads that NumPy's blocks and products are shared among."""

import gc
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, in_a_new_process
from gpt_xp_backends import numpy_blocks
from gpt_xp_backends.numpy_blocks import Threads


def run_places(pool: Threads) -> list[int]:
    """Which places were run; all at once, or this waits for ever."""
    barrier, places = threading.Barrier(pool.n, timeout=PATIENCE), []

    def place_of(place: int) -> None:
        barrier.wait()
        places.append(place)

    pool.run(place_of)
    return sorted(places)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_place_is_run_once_and_all_at_once(n: int) -> None:
    pool = Threads(n)
    for _ in range(3):
        assert run_places(pool) == list(range(n))
    done: list[int] = []
    pool.take_turns(done.append, list(range(101)))
    assert sorted(done) == list(range(101))


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError("an error"), KeyboardInterrupt()])
def test_an_error_is_raised_once_all_are_done(where: int, error: BaseException) -> None:
    pool, finished = Threads(3), []

    def fail(place: int) -> None:
        if place == where:
            raise error
        time.sleep(0.05)
        finished.append(place)

    with pytest.raises(type(error)) as raised:
        pool.run(fail)
    assert raised.value is error
    assert sorted(finished) == [place for place in range(3) if place != where]
    for _ in range(3):
        assert run_places(pool) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        pool.take_turns(lambda each: 1 / each, [1, 2, 0, 3])
    assert run_places(pool) == [0, 1, 2]


def test_results_that_nobody_waited_for_are_not_those_of_the_next_call() -> None:
    """Ctrl-C while the caller waits: a thread that still works is waited for by the next call, not taken for it."""
    pool, go, late = Threads(2), threading.Event(), []

    class Interrupted(numpy_blocks.queue.SimpleQueue):  # type: ignore[misc]
        def get(self, *args: Any) -> Any:
            raise KeyboardInterrupt

    def slow(place: int) -> None:
        if place:
            go.wait(PATIENCE)
            late.append(place)

    assert run_places(pool) == [0, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_blocks, "queue", SimpleNamespace(SimpleQueue=Interrupted))
        with pytest.raises(KeyboardInterrupt):
            pool.run(slow)
    assert not late
    go.set()
    assert run_places(pool) == [0, 1]
    assert late == [1]


def test_two_callers_take_turns() -> None:
    pool, inside, seen = Threads(2), [], []

    def call(name: str) -> None:
        def one(_: int) -> None:
            inside.append(name)
            time.sleep(0.001)
            seen.append(set(inside))
            inside.remove(name)

        for _ in range(20):
            pool.run(one)

    callers = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
        assert not caller.is_alive()
    assert len(seen) == 80
    assert {frozenset(each) for each in seen} == {frozenset("a"), frozenset("b")}


def test_threads_start_with_the_first_work_and_end_with_the_pool() -> None:
    before = set(threading.enumerate())
    pool = Threads(3)
    assert set(threading.enumerate()) == before
    run_places(pool)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    assert all(thread.daemon for thread in started)
    array = np.zeros(3)
    sizes = sys.getrefcount(array)
    pool.run(lambda place, array=array: None)  # type: ignore[misc]
    assert sys.getrefcount(array) == sizes, "a thread keeps the arrays of its last work"
    del pool
    gc.collect()
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()


POOL = """
import json, os, sys, threading
from gpt_xp_backends.numpy_blocks import Threads
pool, done = Threads(2), []
pool.run(done.append)
"""


def test_a_process_ends_though_its_threads_wait() -> None:
    assert in_a_new_process(POOL + "print(json.dumps(sorted(done)))") == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("while_working", [False, True])
def test_a_forked_process_has_threads_of_its_own(while_working: bool) -> None:
    fork = """
def child():
    pid = os.fork()
    if not pid:
        done.clear()
        pool.run(done.append)
        os._exit(sorted(done) != [0, 1])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
    end = "pool.run(lambda place: place or codes.append(child()))" if while_working else "codes.append(child())"
    quiet = "import warnings; warnings.simplefilter('ignore'); codes = []\n"  # of a fork beside threads
    code = POOL + quiet + fork + end + "\ndone.clear(); pool.run(done.append); print(json.dumps([codes, sorted(done)]))"
    assert in_a_new_process(code) == [[0], [0, 1]]


def test_numpys_error_state_is_the_callers() -> None:
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        Threads(2).run(lambda place: 1 / np.zeros(1) if place else None)
    found: list[Any] = []
    with np.errstate(divide="ignore"):  # a warning would be an error here
        Threads(2).run(lambda place: found.append(1 / np.zeros(1)))
    assert found == [np.inf, np.inf]
