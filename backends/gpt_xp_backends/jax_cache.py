"""The cache of JAX on CPUs: an array for each layer, as long as what a step looks at.

XLA's CPU compiler copies a part of an array before it multiplies by it, and by whole arrays it multiplies where they
are. So a layer's keys have an array of their own, without slots that are not looked at yet: when more are, it grows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt_xp.config import GPT2Config
from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace


class LayeredCache(KVCache):
    """`k` and `v` have an array [batch * n_head, n_slots, d_head] for each layer; all else is as in `KVCache`."""

    @property
    def n_slots(self) -> int:
        """How many tokens fit before the ring begins again, or before it grows."""
        return int(self.k[0].shape[1])

    def write(self, layer: int, k: Array, v: Array, xp: Namespace) -> "LayeredCache":
        """Put the keys and values [batch, n_head, n_seq, d_head] of the next `n_seq` tokens into one layer."""
        return self._replace(k=self._put(self.k, layer, k), v=self._put(self.v, layer, v))

    def _put(self, layers: tuple[Array, ...], layer: int, new: Array) -> tuple[Array, ...]:
        first = self.position % self.n_slots
        rows = new.reshape((-1, *new.shape[2:]))  # [batch * n_head, n_seq, d_head]
        changed = jax.lax.dynamic_update_slice_in_dim(layers[layer], rows, first, axis=1)
        return (*layers[:layer], changed, *layers[layer + 1 :])

    def read(self, layer: int, window: int | None) -> tuple[Array, Array]:
        """Keys and values of the first `window` slots of one layer, each [batch, n_head, window, d_head]."""
        return self._heads(self.k[layer], window), self._heads(self.v[layer], window)

    def _heads(self, rows: Array, window: int | None) -> Array:
        return rows.reshape((self.start.shape[0], -1, *rows.shape[1:]))[:, :, :window, :]

    def copy(self, xp: Namespace = None) -> "LayeredCache":
        """A cache of its own with the same content, so that two continuations can begin here."""
        copied: LayeredCache = jax.tree.map(jnp.copy, self)
        return copied


def new_layered_cache(config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace) -> LayeredCache:
    """An empty cache, by the arguments of `gpt_xp.new_cache`."""
    shape = start.shape[0] * config.n_head, n_slots, config.n_embd // config.n_head

    def layers() -> Any:
        return tuple(xp.zeros(shape, dtype=like.dtype) for _ in range(config.n_layer))

    return LayeredCache(layers(), layers(), 0, start)


def grown(scope: Callable[[], Any], cache: LayeredCache, n_slots: int) -> LayeredCache:
    """The same cache with more slots, before its ring has begun again; the one given is gone."""

    def longer(layers: tuple[Array, ...]) -> Any:
        return tuple(_longer(each, n_slots) for each in layers)

    with scope():
        return cache._replace(k=longer(cache.k), v=longer(cache.v))


def _longer(rows: Array, n_slots: int) -> Array:
    made = jnp.pad(rows, ((0, 0), (0, n_slots - rows.shape[1]), (0, 0)))
    rows.delete()  # layer by layer, so that there are never two caches
    return made
