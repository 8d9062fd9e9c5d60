"""The key/value cache: the keys and values of all tokens so far, so that no token is computed twice.

A `KVCache` is a value. The model takes one and returns the next. The cache passed in is consumed: NumPy writes into it
in place, and JAX may reuse its memory. `copy` makes a second cache for another continuation. Attention reads all slots,
so a cache is kept short and grows as needed (`grow_cache`).

Every row of a batch writes to the same slot at the same time. Shorter prompts are padded on the left, and `start[b]`
is the slot at which row b really begins. The slots are a ring: after the last one comes the first again. No row looks
back further than its context, so `n_ctx` slots are enough for any batch.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import array_api_extra as xpx
from array_api_compat import array_namespace, is_jax_array, is_numpy_array, is_writeable_array

from gpt_xp.arrays import device_of
from gpt_xp.config import GPT2Config, check_config
from gpt_xp.errors import ConfigError, PromptError
from gpt_xp.types import Array, Namespace


class LayerCache(NamedTuple):
    """The keys and values of one layer, shaped as in `KVCache`, and the number of tokens written."""

    k: Array
    v: Array
    position: int | Array

    def append(self, k: Array, v: Array, xp: Namespace) -> tuple["LayerCache", Array, Array]:
        """Put the keys and values [batch, n_head, n_seq, d_head] of the next tokens into their slots.

        Returns the layer, and the keys and values of all its slots, each [batch, n_head, n_slots, d_head]. Raises
        `PromptError` for more tokens than there are slots before the ring begins again. Inside `jax.jit` the position
        is not known, so only more tokens than all slots are an error there.
        """
        batch, n_head, n_seq, d_head = k.shape
        *rows, n_slots, _ = self.k.shape
        first = self.position % n_slots
        room = n_slots - (first if isinstance(first, int) else 0)
        if n_seq > room:
            raise PromptError(
                f"{n_seq} tokens were given, and the cache has room for {room} before its ring begins again: "
                "make it larger, or pass fewer tokens at a time"
            )
        new_k, new_v = (xp.reshape(x, (*rows, n_seq, d_head)) for x in (k, v))
        layer = LayerCache(_put(self.k, first, new_k, xp), _put(self.v, first, new_v, xp), self.position)
        k, v = (xp.reshape(x, (batch, n_head, n_slots, d_head)) for x in (layer.k, layer.v))
        return layer, k, v


Past: TypeAlias = LayerCache | None  # It is None without a cache.


class KVCache(NamedTuple):
    """The keys and values of every layer, and where the next token goes.

    `layers` has (k, v) for each layer, each [batch * n_head, n_slots, d_head] in the dtype of the params. `position`
    counts the tokens written to each row, including padding. It is an int, or an int32 scalar in a compiled step.
    `start` is [batch] int32.

    XLA's CPU compiler multiplies by arrays of three axes. Arrays of four are copied for each token: at 930 tokens of
    context, a token then takes 1.9 times as long (benchmarks/before_after.py). A backend that spreads rows and heads
    over several devices may keep them apart: [batch, n_head, n_slots, d_head].
    """

    layers: list[tuple[Array, Array]]
    position: int | Array
    start: Array

    @property
    def n_slots(self) -> int:
        """The number of tokens that fit before the cache grows, or its ring begins again."""
        return int(self.layers[0][0].shape[-2])

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer."""
        return LayerCache(*self.layers[index], self.position)

    def after(self, layers: Sequence[Any], n_seq: int) -> "KVCache":
        """Return the cache after `n_seq` more tokens, whose keys and values `layers` hold already."""
        return KVCache([(each.k, each.v) for each in layers], self.position + n_seq, self.start)

    def copy(self, xp: Namespace = None) -> "KVCache":
        """Return an independent copy, so that two continuations can begin here."""
        xp = xp or array_namespace(self.layers[0][0])

        def copied(x: Any) -> Any:  # The position is copied too, because a compiled step may reuse its memory.
            return x if isinstance(x, int) else xp.asarray(x, copy=True)

        return KVCache([(copied(k), copied(v)) for k, v in self.layers], copied(self.position), copied(self.start))


def positions_and_mask(tokens: Array, config: GPT2Config, cache: KVCache | None, xp: Namespace) -> tuple[Array, Array]:
    """Return the position of each token [batch * n_seq], int32, and the mask of attention, float32.

    The mask is added to the scores: 0 for visible tokens, the smallest float32 for hidden ones. Without a cache it is
    [n_seq, n_seq], and each token sees itself and all before it. With a cache it is [batch, 1, n_seq, n_slots]. Raises
    `PromptError` for tokens that do not fit the cache or the context.
    """
    n_seq = tokens.shape[-1]
    if cache is not None and tokens.shape[:-1] != cache.start.shape:
        raise PromptError(
            f"tokens have the shape {tuple(tokens.shape)}, and with this cache it must be [batch, n_seq] "
            f"of {cache.start.shape[0]} rows"
        )
    n_slots = n_seq if cache is None else cache.n_slots
    numbers, slots = (xp.arange(n, dtype=xp.int32, device=device_of(tokens)) for n in (n_seq, n_slots))
    if cache is None:
        config.check_length(n_seq)
        positions = xp.broadcast_to(numbers, (*tokens.shape[:-1], n_seq))
        visible = slots[None, :] <= numbers[:, None]
    else:
        query = numbers + cache.position  # the slots of these tokens, [n_seq]
        # Padding has negative positions, and finished rows continue past the context. Both are computed with the rest
        # of the batch and then ignored. They must not read outside the table.
        positions = xp.clip(query[None, :] - cache.start[:, None], 0, config.n_ctx - 1)
        visible = _written(query[:, None], slots) >= cache.start[:, None, None, None]
    # The number is finite, so that padding, which sees no token, does not become NaN.
    mask = float(xp.finfo(xp.float32).min) * xp.astype(~visible, xp.float32)
    return xp.reshape(positions, (-1,)), mask


def _written(query: Array, slots: Array) -> Array:
    """Return the number of the token in each of `slots` [n_slots], as the token `query` [n_seq, 1] sees it.

    It is the latest token written to that slot that is not after the query. In a ring of 8, query 9 finds tokens 8 and
    9 in slots 0 and 1, and the older tokens 2 to 7 in slots 2 to 7.
    """
    return query - (query - slots) % slots.shape[0]  # [n_seq, n_slots]


def _put(buffer: Array, first: int | Array, new: Array, xp: Namespace) -> Array:
    """Return `buffer` with `new` [..., n_seq, d_head] from slot `first` on, in place where possible."""
    is_writeable = is_writeable_array(buffer)
    if not is_writeable and is_jax_array(buffer):
        from jax.lax import dynamic_update_slice_in_dim  # Compiled, it is faster than `at`.

        return dynamic_update_slice_in_dim(buffer, new, first, axis=-2)
    n_seq = new.shape[-2]
    if isinstance(first, int):
        slots = slice(first, first + n_seq)
    else:  # It is an array: a step that is captured appends one token.
        slots = first[None] if n_seq == 1 else first + xp.arange(n_seq, dtype=xp.int32)
    index = (..., slots, slice(None))
    if is_writeable:  # `at` does the same, but takes longer, twice in every layer.
        buffer[index] = new
        return buffer
    return xpx.at(buffer, index).set(new)


def new_cache(config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace = None) -> KVCache:
    """Return an empty cache of `n_slots` slots for rows whose left padding ends at `start` [batch], whole numbers.

    Its library, dtype and device are those of `like` (a weight of the model). `start` may be a list, or of any library.
    Raises `ConfigError` for a config, `like` or `n_slots` that cannot be, and `PromptError` for such a `start`.
    """
    check_config(config)
    if not hasattr(like, "dtype"):
        raise ConfigError(f"like must be an array of the model, such as params['wpe'], not {type(like).__name__}")
    if not isinstance(n_slots, Integral) or n_slots < 1:
        raise ConfigError(f"n_slots must be a whole number of at least 1, not {n_slots!r:.80}")
    xp = xp or array_namespace(like)
    start = _checked_start(start, xp, device_of(like))
    shape = start.shape[0] * config.n_head, n_slots, config.n_embd // config.n_head

    def zeros() -> Array:
        return xp.zeros(shape, dtype=like.dtype, device=device_of(like))

    return KVCache([(zeros(), zeros()) for _ in range(config.n_layer)], 0, start)


def _checked_start(start: Any, xp: Namespace, device: Any) -> Array:
    """Return `start` as int32 [batch] on the device. Numbers of JAX and of GPUs are not checked: that would wait."""
    values = start.tolist() if is_numpy_array(start) else start
    if isinstance(values, list | tuple):
        is_whole = all(isinstance(each, Real) and float(each) >= 0 and float(each) % 1 == 0 for each in values)
    else:
        is_whole = len(getattr(start, "shape", ())) == 1
    if not is_whole:
        raise PromptError(f"start must have one whole number for each row, [batch], of at least 0, not {start!r:.80}")
    return xp.asarray(start, dtype=xp.int32, device=device)


def grow_cache(cache: KVCache, n_slots: int, xp: Namespace = None) -> KVCache:
    """Return the cache with `n_slots` slots; its ring must not have begun again. The cache passed in is consumed.

    Each layer is replaced in turn, so that memory never holds two caches.
    """
    xp = xp or array_namespace(cache.layers[0][0])

    def longer(x: Array) -> Array:
        *rows, before, d_head = x.shape
        more = xp.zeros((*rows, n_slots - before, d_head), dtype=x.dtype, device=device_of(x))
        return xp.concat([x, more], axis=-2)

    for i, (k, v) in enumerate(cache.layers):
        cache.layers[i] = longer(k), longer(v)
    return cache
