"""A list of kernels that is run again and again, the memory that they use, and the place of the cache."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array
from gpt_xp_backends.native_backend import threads
from gpt_xp_backends.native_backend.machine import numbers

ALIGNMENT = 64  # bytes of a line of the processor's cache


class NotTracedError(Exception):
    """This step cannot be a tape, and is computed as it stands."""


class Arena:
    """Memory for the arrays of a step. The memory of an array that no code holds is used again by a later kernel."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}

    def empty(self, *shape: int) -> "np.ndarray[Any, Any]":
        """Return a float32 array."""
        n_bytes = -(-4 * int(np.prod(shape)) // 4096) * 4096
        free = self._free.setdefault(n_bytes, [])
        block = free.pop() if free else np.empty(n_bytes + ALIGNMENT, np.uint8)
        begin = -block.ctypes.data % ALIGNMENT
        owner = np.frombuffer(block.data[begin : begin + n_bytes], np.float32)  # the base of all views
        weakref.finalize(owner, free.append, block).atexit = False
        return owner[: int(np.prod(shape))].reshape(shape)


class Tape:
    """Kernels in their order, with their arguments; and NumPy's calls, which come before them."""

    def __init__(self, arena: Arena, n_threads: int, cache: KVCache | None = None) -> None:
        self.arena, self.n_threads, self.cache = arena, n_threads, cache and CacheTable(cache)
        self._host: list[Callable[[], Any]] = []
        self._kernels: list[tuple[int, int, bool]] = []
        self._kept: list[Any] = []
        self._calls: threads.Calls | None = None
        self._memory: dict[str, Any] = {}

    def host(self, call: Callable[[], Any]) -> None:
        """Note a call of NumPy that has been made."""
        self._host.append(call)

    def add(self, kernel: int, *arguments: int, keep: tuple[Any, ...] = (), alone: bool = False) -> None:
        """Add a kernel. It is run by one thread `alone` where it is too small to share."""
        array = numbers(*arguments)
        self._kernels.append((kernel, array.ctypes.data, alone))
        self._kept += (array, *keep)

    def scratch(self, bytes_each: int) -> int:
        """Return the address of memory with that many bytes for each thread. Every kernel may use it anew."""
        n_bytes = bytes_each * self.n_threads + ALIGNMENT
        block = self._memory.get("scratch")
        if block is None or block.nbytes < n_bytes:
            block = self._memory["scratch"] = np.empty(n_bytes, np.uint8)
            self._kept.append(block)
        return int(block.ctypes.data + -block.ctypes.data % ALIGNMENT)

    def run(self) -> None:
        """Run all calls."""
        for call in self._host:
            call()
        self._calls = self._calls or threads.Calls(self._kernels)
        self._calls.run(self.n_threads)


class CacheTable:
    """Where the keys and values of each layer are. Kernels read it, so a tape serves any cache of the same shapes."""

    def __init__(self, cache: KVCache) -> None:
        self.numbers = np.empty((len(cache.layers), 3), np.int64)  # of keys, of values, bytes of a head
        self._arrays: list[Any] = []
        self.bind(cache)
        self._rows = {int(row[0]): row.ctypes.data for row in self.numbers}

    def bind(self, cache: KVCache) -> None:
        """Take the arrays of a cache. Raises `NotTracedError` where they lie in memory in an unusual way."""
        arrays = [x for layer in cache.layers for x in layer]
        if self._arrays and all(before() is x for before, x in zip(self._arrays, arrays, strict=True)):
            return
        for row, (k, v) in zip(self.numbers, cache.layers, strict=True):
            if (
                not k.strides == v.strides
                or k.strides[1:] != (4 * k.shape[2], 4)
                or not k.dtype == v.dtype == np.float32
            ):
                raise NotTracedError("the cache lies in memory in an unusual way")
            row[:] = k.ctypes.data, v.ctypes.data, k.strides[0]
        self._arrays = [weakref.ref(x) for x in arrays]

    def row(self, k: Array) -> int:
        """Return the address of the numbers of a layer, which is found by its keys."""
        return self._rows[k.ctypes.data]
