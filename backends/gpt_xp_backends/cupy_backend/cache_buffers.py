"""Keeps the arrays of the last cache, so that the next generation finds its graphs."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

from gpt_xp import kv_cache
from gpt_xp.config import GPT2Config
from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace


class CacheBuffers:
    """Hands out caches that are views of kept arrays, where these are large enough and no other cache has them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # Two generations that begin at once must not have the same arrays.
        self._kind: Any = None
        self._kept: list[tuple[Array, Array]] = []  # keys and values of each layer
        self._views: list[Callable[[], Array | None]] = []  # weak references to the views that were handed out last

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace) -> KVCache:
        """Return an empty cache, by the arguments of `gpt_xp.new_cache`."""
        start = xp.asarray(start, dtype=xp.int32)
        kind = config, like.dtype, start.shape
        with self._lock:
            are_free = all(view() is None for view in self._views)
            if are_free and kind == self._kind and n_slots <= self._n_slots():
                self._clear(0, n_slots)
            else:
                self._kept = []  # before new ones are made: memory may not be enough for both
                self._kind, self._kept = kind, kv_cache.new_cache(config, like, n_slots, start, xp).layers
            return KVCache(self._hand_out(n_slots), 0, start)

    def grow_cache(self, cache: KVCache, n_slots: int, xp: Namespace) -> KVCache:
        """Return the cache with more slots, as `kv_cache.grow_cache` does."""
        with self._lock:
            if [id(view()) for view in self._views] != [id(x) for layer in cache.layers for x in layer]:
                return kv_cache.grow_cache(cache, n_slots, xp)  # The kept arrays are another generation's.
            if n_slots <= self._n_slots():
                self._clear(cache.n_slots, n_slots)
            else:
                self._kept = []  # Each layer's arrays are freed when it has longer ones.
                self._kept = [*kv_cache.grow_cache(cache, n_slots, xp).layers]
            cache.layers[:] = self._hand_out(n_slots)
            return cache

    def _n_slots(self) -> int:
        return int(self._kept[0][0].shape[1]) if self._kept else 0

    def _clear(self, first: int, last: int) -> None:
        """Put zeros into some slots. Those that are masked are multiplied by 0, so NaN in them would show."""
        for layer in self._kept:
            for x in layer:
                x[:, first:last].fill(0)

    def _hand_out(self, n_slots: int) -> list[tuple[Array, Array]]:
        views = [(k[:, :n_slots], v[:, :n_slots]) for k, v in self._kept]
        self._views = [weakref.ref(x) for layer in views for x in layer]
        return views
