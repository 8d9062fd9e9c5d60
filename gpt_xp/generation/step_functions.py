"""The functions that generation runs on the device. They are pure, so a backend may compile them."""

from typing import Any

from gpt_xp.arrays import at_least_float32, device_of
from gpt_xp.config import GPT2Config
from gpt_xp.generation.sampling import Choice, choose
from gpt_xp.kv_cache import KVCache
from gpt_xp.transformer import gpt2_with_cache, hidden_states, unembed
from gpt_xp.types import Array, Namespace, Params


def next_token_logits(
    params: Params, tokens: Array, cache: KVCache, count: int | Array, config: GPT2Config, xp: Namespace
) -> tuple[Array, KVCache]:
    """Return logits [batch, n_vocab], at least float32, after the first `count` of tokens [batch, n_seq].

    The other tokens are padding. They are written to the cache too, but no token sees them, and the next tokens
    overwrite them.
    """
    x, after = hidden_states(params, tokens, config, cache, xp)  # [batch, n_seq, n_embd]
    assert after is not None
    logits = at_least_float32(unembed(x[:, count - 1, :], params["wte"], xp), xp)
    return logits, after._replace(position=cache.position + count)


def prompt_logits(
    params: Params, tokens: Array, cache: KVCache, config: GPT2Config, xp: Namespace
) -> tuple[Array, KVCache]:
    """Return logits [batch, n_seq, n_vocab], at least float32, after each of tokens [batch, n_seq]."""
    logits, cache = gpt2_with_cache(params, tokens, config, cache, xp)
    return at_least_float32(logits, xp), cache


def candidate_logits(
    params: Params, tokens: Array, cache: KVCache, config: GPT2Config, xp: Namespace
) -> tuple[list[Array], KVCache]:
    """Return the logits of `prompt_logits` as a list of [batch, n_vocab], one for each of the n_seq tokens."""
    logits, cache = prompt_logits(params, tokens, cache, config, xp)
    return [logits[:, position, :] for position in range(tokens.shape[1])], cache


def mark(seen: Array, token: Array, xp: Namespace) -> Array:
    """Return `seen` [batch, n_vocab] with one more token [batch] int32 marked in each row."""
    ids = xp.arange(seen.shape[1], dtype=xp.int32, device=device_of(seen))
    return seen | (ids == token[:, None])


def decode_steps(
    params: Params,
    token: Array,
    cache: KVCache,
    seen: Array | None,
    noise: Array | None,
    allowed: Array | None,
    k: int,
    decode_block: Any,
    config: GPT2Config,
    xp: Namespace,
    **filters: Any,
) -> tuple[Choice, tuple[KVCache, Array | None]]:
    """Decode `k` more tokens after `token` [batch] int32; return a `Choice` of [k, batch], the cache, and `seen`.

    `noise` is [k, batch, n_vocab]. `decode_block` is the backend's. The other arguments are those of `choose`.
    """
    first = cache.position

    def step(state: tuple[Array, KVCache, Array | None]) -> tuple[Any, Choice]:
        token, cache, seen = state
        drawn = None if noise is None else noise[cache.position - first, ...]
        logits, cache = next_token_logits(params, token[:, None], cache, 1, config, xp)
        choice = choose(logits, drawn, seen, allowed, xp=xp, **filters)
        token = xp.astype(choice.token, xp.int32)
        return (token, cache, None if seen is None else mark(seen, token, xp)), choice

    (_, cache, seen), choices = decode_block(step, (token, cache, seen), k)
    return choices, (cache, seen)
