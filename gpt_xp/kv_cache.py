"""The key/value cache: what attention has computed for the tokens so far, so that no token is computed twice.

A `KVCache` is a value. `gpt2` takes one and returns the next, and the one that was passed in is consumed: NumPy
writes into it in place, and JAX may reuse its memory. `copy` forks a cache that is needed twice.

Every row of a batch writes to the same slot at the same time; shorter prompts are padded on the left, and
`start[b]` is the slot at which row b really begins. The buffers are a ring: after the last slot comes the first
again. No row ever looks back further than its context, so `n_ctx` slots are enough for any batch.
"""

from typing import Any, NamedTuple

import array_api_extra as xpx
from array_api_compat import array_namespace, is_writeable_array

from gpt_xp.arrays import device_of
from gpt_xp.config import GPT2Config, check_config
from gpt_xp.errors import PromptError
from gpt_xp.types import Array, Namespace


class KVCache(NamedTuple):
    """Keys and values of every layer, and where the next token goes.

    `k` and `v` are [n_layer, batch, n_head, n_slots, d_head] in the dtype of the params; `position` counts the
    tokens written to each row, padding included (an int, or an int32 scalar under `jax.jit`); `start` is [batch]
    int32.
    """

    k: Array
    v: Array
    position: int | Array
    start: Array

    @property
    def n_slots(self) -> int:
        """How many tokens fit before the ring begins again."""
        return int(self.k.shape[3])

    def positions(self, n_seq: int, n_ctx: int, xp: Namespace) -> Array:
        """The positions [batch, n_seq], int32, of the next `n_seq` tokens of each row, counted from its start."""
        positions = self._slots(n_seq, xp)[None, :] - self.start[:, None]
        # Padding has negative positions, and rows that have ended run on past the context: both are computed with
        # the rest of the batch and looked at by nobody, but they must not read outside the table.
        return xp.clip(positions, 0, n_ctx - 1)

    def visible(self, n_seq: int, window: int | None, xp: Namespace) -> Array:
        """Which of the first `window` slots each of the next `n_seq` tokens may look at: [batch, 1, n_seq, window]."""
        query = self._slots(n_seq, xp)[:, None]  # [n_seq, 1]
        slot = xp.arange(window or self.n_slots, dtype=xp.int32, device=device_of(self.start))  # [window]
        # A slot's content was written at the last turn of the ring that is not after the query.
        # In a ring of 8, query 9 finds tokens 8, 9 in slots 0, 1 and the older 2 .. 7 in slots 2 .. 7.
        written = query - (query - slot) % self.n_slots  # [n_seq, window]
        return written >= self.start[:, None, None, None]

    def write(self, layer: int, k: Array, v: Array, xp: Namespace) -> "KVCache":
        """Put the keys and values [batch, n_head, n_seq, d_head] of the next `n_seq` tokens into one layer."""
        n_seq = k.shape[2]
        first = self.position % self.n_slots
        room = self.n_slots - (first if isinstance(first, int) else 0)
        if n_seq > room:
            raise PromptError(
                f"{n_seq} tokens were given, and the cache has room for {room} before its ring begins again: "
                "make it larger, or pass fewer tokens at a time"
            )
        if isinstance(first, int):
            slots = slice(first, first + n_seq)
        elif n_seq == 1:
            slots = first[None]
        else:
            slots = first + xp.arange(n_seq, dtype=xp.int32)
        # A full index, of which one entry may be traced: JAX then updates the buffer in place.
        index = (slice(layer, layer + 1), slice(None), slice(None), slots, slice(None))
        return KVCache(_put(self.k, index, k), _put(self.v, index, v), self.position, self.start)

    def read(self, layer: int, window: int | None) -> tuple[Array, Array]:
        """Keys and values of the first `window` slots of one layer, each [batch, n_head, window, d_head]."""
        return self.k[layer, :, :, :window, :], self.v[layer, :, :, :window, :]

    def advance(self, n_seq: int) -> "KVCache":
        """Count `n_seq` tokens as written."""
        return self._replace(position=self.position + n_seq)

    def copy(self, xp: Namespace = None) -> "KVCache":
        """A cache of its own with the same content, so that two continuations can begin here."""
        xp = xp or array_namespace(self.k)
        # All of it: a compiled step that may reuse the memory of a cache takes its position too.
        return KVCache(*(part if isinstance(part, int) else xp.asarray(part, copy=True) for part in self))

    def _slots(self, n_seq: int, xp: Namespace) -> Array:
        return xp.arange(n_seq, dtype=xp.int32, device=device_of(self.start)) + self.position


def _put(buffer: Array, index: tuple[Any, ...], new: Array) -> Array:
    """Return `buffer` with `new` at `index`: in place where that can be done, and a new array in JAX."""
    if is_writeable_array(buffer):  # what `at` would find out too, at more cost, twice in every layer of every step
        buffer[index] = new[None, ...]
        return buffer
    return xpx.at(buffer, index).set(new[None, ...])


def new_cache(config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace = None) -> KVCache:
    """Return an empty cache of `n_slots` slots for rows whose left padding ends at `start` [batch], whole numbers.

    Its library, dtype and device are those of `like` (a weight of the model); `start` may be of any library, or a list.
    Raises `ConfigError` for another config, and `PromptError` for another shape of `start`.
    """
    check_config(config)
    xp = xp or array_namespace(like)
    start = xp.asarray(start, dtype=xp.int32, device=device_of(like))
    if len(start.shape) != 1:
        raise PromptError(f"start must have one whole number for each row, [batch], and its shape is {start.shape}")
    shape = (config.n_layer, start.shape[0], config.n_head, n_slots, config.n_embd // config.n_head)
    # Two calls: k and v must not share memory, or JAX cannot reuse it.
    k = xp.zeros(shape, dtype=like.dtype, device=device_of(like))
    v = xp.zeros(shape, dtype=like.dtype, device=device_of(like))
    return KVCache(k, v, 0, start)
