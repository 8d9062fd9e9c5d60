"""Runs a model on its backend: token ids in, logits out.

Prefill runs a prompt through the model in chunks, so that attention never makes a matrix of context x context. Decode
runs one token of each row. Both use the same function, `next_token_logits`, which a backend may compile.

    decoder = Decoder(params, config, backend)
    logits, cache = decoder.prefill([[10, 11, 12]])       # [1, n_vocab], after the last token
    logits, cache = decoder.decode([13], cache)           # after one token more
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpt_xp.backend import Backend
from gpt_xp.config import GPT2Config
from gpt_xp.generation.step_functions import candidate_logits, decode_steps, next_token_logits, prompt_logits
from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Params

Tokens: TypeAlias = "Sequence[Sequence[int]] | np.ndarray[Any, Any]"  # [batch, n_seq]; rows may differ in length


class Decoder:
    """The compiled steps of a model, and the cache that they share.

    `params` must be on the backend's device. In every cache that it returns, `position` is a Python int.
    """

    def __init__(self, params: Params, config: GPT2Config, backend: Backend) -> None:
        self.params, self.config, self.backend = params, config, backend
        # The functions are compiled without binding arguments, so that JAX shares programs between models of one shape.
        static, donate = ("config", "xp"), ("cache",)
        self._next_token_logits = backend.compile_step(next_token_logits, static, donate)
        self._prompt_logits = backend.compile(prompt_logits, static, donate)
        self._candidate_logits = backend.compile(candidate_logits, static, donate)
        self._decode_steps = backend.compile(decode_steps, ("k", "decode_block", "top_k", *static), donate)

    def prefill(self, prompts: Tokens) -> tuple[Array, KVCache]:
        """Run the prompts; return logits [batch, n_vocab] after the last token of each, and the cache."""
        tokens, cache = self.start(prompts)
        while cache.position < tokens.shape[1]:
            count = min(self.chunk_tokens(tokens), tokens.shape[1] - cache.position)
            chunk, cache = self.next_chunk(tokens, cache)
            logits, cache = self._step(chunk, cache, count)
        return logits, cache

    def decode(self, token: Any, cache: KVCache) -> tuple[Array, KVCache]:
        """Run one more token [batch] of each row; return logits [batch, n_vocab] and the cache.

        The cache passed in is consumed.
        """
        cache = self.grow_cache(cache, cache.position + 1)
        return self._step(self.backend.asarray(np.asarray(token, dtype=np.int32)[:, None]), cache, 1)

    def prompt_logits(self, token_ids: Tokens) -> Iterator["np.ndarray[Any, Any]"]:
        """Yield the logits at all positions, [batch, n_seq, n_vocab] on the host, chunk by chunk."""
        tokens, cache = self.start(token_ids)
        while (begin := cache.position) < tokens.shape[1]:
            chunk, cache = self.next_chunk(tokens, cache)
            logits, cache = self._prompt_logits(self.params, chunk, cache, config=self.config, xp=self.backend.xp)
            cache = cache._replace(position=begin + chunk.shape[1])
            yield self.backend.to_numpy(logits)[:, : tokens.shape[1] - begin]

    def candidate_logits(self, tokens: "np.ndarray[Any, Any]", cache: KVCache) -> tuple[list[Array], KVCache]:
        """Run tokens [batch, n_seq]; return n_seq logits [batch, n_vocab], one after each token, and the cache.

        To take back wrong tokens, set `position` of the cache to its former value plus the number of right tokens.
        """
        before = cache.position
        cache = self.grow_cache(cache, before + tokens.shape[1])
        logits, cache = self._candidate_logits(
            self.params, self.backend.asarray(tokens), cache, config=self.config, xp=self.backend.xp
        )
        return logits, cache._replace(position=before + tokens.shape[1])

    def decode_steps(self, token: Any, cache: KVCache, k: int, **choosing: Any) -> tuple[Any, KVCache, Array | None]:
        """Start `k` steps as one program; return their `Choice` [k, batch], the cache, and the new `seen`.

        The device may still be computing them. `choosing` are the other arguments of `step_functions.decode_steps`.
        """
        backend, before = self.backend, cache.position
        choices, (cache, seen) = self._decode_steps(
            self.params, backend.asarray(np.asarray(token, dtype=np.int32)), self.grow_cache(cache, before + k),
            k=k, decode_block=backend.decode_block, config=self.config, xp=backend.xp, **choosing,
        )  # fmt: skip
        return choices, cache._replace(position=before + k), seen

    def start(self, prompts: Tokens) -> tuple["np.ndarray[Any, Any]", KVCache]:
        """Pad the prompts on the left to one length: return tokens [batch, n_seq] int32, and an empty cache."""
        total = max(len(prompt) for prompt in prompts)
        tokens = np.zeros((len(prompts), total), dtype=np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[total - len(prompt) :] = prompt
        start = self.backend.asarray(np.asarray([total - len(prompt) for prompt in prompts], dtype=np.int32))
        n_slots = self.backend.cache_slots(min(total, self.chunk_tokens(tokens)), self.config.n_ctx)
        return tokens, self.backend.new_cache(self.config, self.params["wpe"], n_slots, start)

    def chunk_tokens(self, tokens: "np.ndarray[Any, Any]") -> int:
        """Return how many tokens of each row of a batch are computed together."""
        return self.backend.chunk_tokens(len(tokens))

    def next_chunk(
        self, tokens: "np.ndarray[Any, Any]", cache: KVCache, n_tokens: int | None = None
    ) -> tuple[Array, KVCache]:
        """Return the next chunk of `tokens` [batch, n_seq] that is not in the cache, on the device, and the cache.

        It has at most `n_tokens` of each row (default: `chunk_tokens`), and may be padded on the right. The cache is
        grown to hold it.
        """
        begin = cache.position
        chunk = tokens[:, begin : begin + (n_tokens or self.chunk_tokens(tokens))]
        padding = self.backend.padded_length(chunk.shape[1], tokens.shape[1]) - chunk.shape[1]
        chunk = np.pad(chunk, ((0, 0), (0, padding)))
        return self.backend.asarray(chunk), self.grow_cache(cache, begin + chunk.shape[1])

    def grow_cache(self, cache: KVCache, n_tokens: int) -> KVCache:
        """Return the cache with slots for `n_tokens` of each row. It never grows beyond the context, but is a ring."""
        n_slots = self.backend.cache_slots(n_tokens, self.config.n_ctx)
        return self.backend.grow_cache(cache, n_slots) if n_slots > cache.n_slots else cache

    def has_room(self, cache: KVCache, n_tokens: int) -> bool:
        """Return whether `n_tokens` more fit before the ring begins again, which would overwrite older tokens."""
        return cache.position + n_tokens <= self.backend.cache_slots(self.config.n_ctx, self.config.n_ctx)

    def _step(self, tokens: Array, cache: KVCache, count: int) -> tuple[Array, KVCache]:
        before = cache.position
        logits: Array
        logits, cache = self._next_token_logits(
            self.params, tokens, cache, count, config=self.config, xp=self.backend.xp
        )
        return logits, cache._replace(position=before + count)
