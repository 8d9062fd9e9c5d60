"""The programs that generation runs, pure functions which a backend may compile: logits of tokens after a cache."""

from typing import Any

from gpt_xp.arrays import device_of
from gpt_xp.backend import DecodeBlock
from gpt_xp.config import GPT2Config
from gpt_xp.generation.sampling import Choice, choose
from gpt_xp.kv_cache import KVCache
from gpt_xp.transformer import at_least_float32, gpt2, hidden_states, unembed
from gpt_xp.types import Array, Namespace, Params


def last_logits(
    params: Params,
    tokens: Array,
    cache: KVCache,
    count: int | Array,
    config: GPT2Config,
    window: int,
    xp: Namespace,
) -> tuple[Array, KVCache]:
    """Logits [batch, n_vocab], at least float32, after the first `count` of tokens [batch, n_seq]; more is padding."""
    x, after = hidden_states(params, tokens, config, cache, window, xp)  # [batch, n_seq, n_embd]
    assert after is not None
    logits = at_least_float32(unembed(x[:, count - 1, :], params["wte"], xp), xp)
    # Padding was written into the cache too. Nobody looks at it, and the next token overwrites it.
    return logits, after._replace(position=cache.position + count)


def all_logits(
    params: Params, tokens: Array, cache: KVCache, config: GPT2Config, window: int, xp: Namespace
) -> tuple[Array, KVCache]:
    """Logits [batch, n_seq, n_vocab] in at least float32, which NumPy has."""
    logits, cache = gpt2(params, tokens, config, cache, window, xp)
    return at_least_float32(logits, xp), cache


def each_logits(
    params: Params, tokens: Array, cache: KVCache, config: GPT2Config, window: int, xp: Namespace
) -> tuple[list[Array], KVCache]:
    """Logits [batch, n_vocab], at least float32, after each of tokens [batch, n_seq]."""
    logits, cache = all_logits(params, tokens, cache, config, window, xp)
    return [logits[:, position, :] for position in range(tokens.shape[1])], cache


def decode_steps(
    params: Params,
    token: Array,
    cache: KVCache,
    seen: Array | None,
    noise: Array | None,
    allowed: Array | None,
    k: int,
    decode_block: DecodeBlock,
    config: GPT2Config,
    window: int,
    xp: Namespace,
    **numbers: Any,
) -> tuple[Choice, KVCache]:
    """Decode `k` more tokens after the latest, `token` [batch] int32: `Choice` of [k, batch] each, and the cache.

    `noise` is [k, batch, n_vocab]; the rest of the arguments are those of `choose` and `last_logits`.
    """
    first = cache.position

    def step(state: tuple[Array, KVCache, Array | None]) -> tuple[Any, Choice]:
        token, cache, seen = state
        drawn = None if noise is None else noise[cache.position - first, ...]
        logits, cache = last_logits(params, token[:, None], cache, 1, config, window, xp)
        choice = choose(logits, drawn, seen, allowed, xp=xp, **numbers)
        token = xp.astype(choice.token, xp.int32)
        if seen is not None:
            ids = xp.arange(seen.shape[1], dtype=xp.int32, device=device_of(seen))
            seen = seen | (ids == token[:, None])
        return (token, cache, seen), choice

    (_, cache, _), choices = decode_block(step, (token, cache, seen), k)
    return choices, cache
