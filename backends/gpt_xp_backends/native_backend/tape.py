"""Lists of kernels that are run again and again, and the memory that they use."""

import math
import weakref
from collections.abc import Callable, Sequence
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
        # All of it, because tapes have its addresses. What is free can be incomplete: Ctrl-C may end `_take_back`.
        self._blocks: list[Any] = []
        self._free: list[Any] = []

    def empty(self, *shape: int) -> "np.ndarray[Any, Any]":
        """Return a float32 array."""
        n_bytes = 4 * math.prod(shape)
        least, most = n_bytes + ALIGNMENT, 4 * n_bytes + 4096  # A result of a few numbers must not hold a large block.
        fitting = [block for block in self._free if least <= block.nbytes <= most]
        if fitting:
            block = min(fitting, key=lambda block: block.nbytes)
            self._free = [each for each in self._free if each is not block]
        else:
            block = np.empty(n_bytes + ALIGNMENT, np.uint8)
            self._blocks.append(block)
        begin = -block.ctypes.data % ALIGNMENT
        owner = np.frombuffer(block.data[begin : begin + n_bytes], np.float32)  # the base of all views
        weakref.finalize(owner, self._take_back, block).atexit = False
        return owner.reshape(shape)

    def owns(self, array: Any) -> bool:
        """Return whether the memory of an array is the arena's."""
        while isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        return isinstance(array, memoryview)

    def _take_back(self, block: Any) -> None:
        self._free.append(block)


class Tape:
    """Kernels in their order, with their arguments; and NumPy's calls, which come before them.

    No call of NumPy reads what a kernel computes, so all of them can come first.
    """

    def __init__(self, arena: Arena, n_threads: int, cache: KVCache | None = None) -> None:
        self.arena, self.n_threads, self.cache = arena, n_threads, cache and CacheTable(cache)
        self._host: list[Callable[[], Any]] = []
        self._calls: list[threads.Call] = []
        self._kept: list[Any] = []
        self._rounds: threads.Rounds | None = None
        self._scratch = np.empty(0, np.uint8)

    def host(self, call: Callable[[], Any]) -> None:
        """Note a call of NumPy that has been made."""
        self._host.append(call)

    def add(self, kernel: int, n_parts: int, *arguments: int, keep: Sequence[Any] = (), alone: bool = False) -> None:
        """Add a kernel whose work has so many parts. One thread runs it `alone` where it is too small to share."""
        array = numbers(*arguments)
        self._calls.append(threads.Call(kernel, array.ctypes.data, n_parts, alone))
        self._kept += (array, *keep)

    def scratch(self, bytes_each: int) -> int:
        """Return the address of memory with that many bytes for each thread. Every kernel may use it anew."""
        n_bytes = bytes_each * self.n_threads + ALIGNMENT
        if self._scratch.nbytes < n_bytes:
            self._scratch = np.empty(n_bytes, np.uint8)
            self._kept.append(self._scratch)
        return int(self._scratch.ctypes.data + -self._scratch.ctypes.data % ALIGNMENT)

    def prepare(self) -> "threads.Rounds":
        """Return what `run` runs, made once."""
        self._rounds = self._rounds or threads.Rounds(self._calls, self.n_threads, self._kept)
        return self._rounds

    def run(self) -> None:
        """Run all calls."""
        for call in self._host:
            call()
        self.prepare().run()


class CacheTable:
    """A table of the addresses of all keys and values. Kernels read it, so a tape serves any cache of its shapes."""

    def __init__(self, cache: KVCache) -> None:
        self.numbers = np.empty((len(cache.layers), 3), np.int64)  # Keys, values, and the bytes of a head.
        self._arrays: list[Any] = []
        self._shape: tuple[int, ...] | None = None
        self.bind(cache)
        self._rows = {(int(row[0]), int(row[1])): row.ctypes.data for row in self.numbers}

    def bind(self, cache: KVCache) -> None:
        """Take the arrays of a cache. Raises `NotTracedError` where they lie in memory in an unusual way."""
        arrays = [x for layer in cache.layers for x in layer]
        if len(arrays) == len(self._arrays) and all(
            before() is x for before, x in zip(self._arrays, arrays, strict=True)
        ):
            return
        shape = cache.layers[0][0].shape
        if any(not _is_usual(x, shape) for x in arrays) or any(k.strides != v.strides for k, v in cache.layers):
            raise NotTracedError("the cache lies in memory in an unusual way")
        if len(cache.layers) != len(self.numbers) or self._shape not in (None, shape):
            raise NotTracedError("the cache has another shape")
        for row, (k, v) in zip(self.numbers, cache.layers, strict=True):
            row[:] = k.ctypes.data, v.ctypes.data, k.strides[0]
        self._shape, self._arrays = shape, [weakref.ref(x) for x in arrays]

    def row(self, k: Array, v: Array) -> int:
        """Return the address of the numbers of a layer. Raises `TypeError` where these are not its keys and values."""
        address = self._rows.get((k.ctypes.data, v.ctypes.data))
        if address is None:
            raise TypeError("keys and values are not those of one layer")
        return address


def _is_usual(x: Array, shape: tuple[int, ...]) -> bool:
    """Return whether keys or values are float32, of this shape, and lie side by side in each head."""
    return bool(x.shape == shape and x.strides[1:] == (4 * shape[2], 4) and x.dtype == np.float32 and x.flags.writeable)
