"""Generation: prefill, then decode one token at a time, for any number of prompts at once.

Prefill runs a prompt through the model in pieces, so that activations stay in the processor's cache and attention
never builds a matrix of context x context; decode runs one token per row and step. Both are the same function,
`last_logits`, which a backend may compile. With speculation, decode runs several tokens that were guessed, and keeps
those that it would have chosen: the same text from fewer steps. On a backend with a `decode_block`, tokens are chosen
where they are computed, and the host sees them a block at a time.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from gpt_xp.backend import Backend, get_backend
from gpt_xp.config import GPT2Config
from gpt_xp.errors import NumericalError
from gpt_xp.generation.host_sampling import choose_among_few
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.results import Piece, Prompt, Row, Stats
from gpt_xp.generation.sampling import Choice, Sampling, choose
from gpt_xp.generation.speculation import WIDTH, Speculation, agree
from gpt_xp.generation.step_functions import all_logits, decode_steps, each_logits, last_logits
from gpt_xp.generation.stop_strings import TextStream
from gpt_xp.kv_cache import KVCache
from gpt_xp.quantization import quantization_of
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.types import Array, Params

PIECE = 128  # tokens whose logits are computed together where several backends are compared
BLOCK = 16  # steps of a `decode_block`: what comes after the end of a text in its last block is computed for nothing


class Clock:
    """Adds up the seconds of each phase, with compiling apart."""

    def __init__(self, backend: Backend) -> None:
        self.prefill = self.decode = self.compile = 0.0
        self._compiled = backend.compile_seconds

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`."""
        compiled, begin = self._compiled(), time.perf_counter()
        yield
        compiling = self._compiled() - compiled
        self.compile += compiling
        setattr(self, phase, getattr(self, phase) + time.perf_counter() - begin - compiling)


@dataclass
class Run:
    """Where a generation stands, between two steps."""

    rows: Sequence[Row]
    sampling: Sampling
    clock: Clock
    choice: Choice  # the latest, not yet in the cache
    cache: KVCache
    used: int  # slots of the cache
    step: int = 1  # how many tokens were chosen for each row
    proposed: int = 0  # tokens, over all rows
    accepted: int = 0

    @property
    def alive(self) -> list[bool]:
        """Which rows go on, [batch]."""
        return [row.finish_reason is None for row in self.rows]


class Engine:
    """A model on its backend: the compiled steps, and the loop around them."""

    def __init__(self, params: Params, config: GPT2Config, tokenizer: Tokenizer | None, backend: Backend) -> None:
        self.params, self.config, self.tokenizer, self.backend = params, config, tokenizer, backend
        self.end_tokens, self.first_token = _roles(config, tokenizer)
        # The very functions, not partial ones: JAX then shares compiled programs between models of one shape.
        static, donate = ("config", "window", "xp"), ("cache",)
        self._new_cache = backend.compile(backend.new_cache, static=("config", "n_slots", "xp"))
        self._last_logits = backend.compile(last_logits, static=static, donate=donate)
        self._all_logits = backend.compile(all_logits, static=static, donate=donate)
        self._each_logits = backend.compile(each_logits, static=static, donate=donate)
        self._decode_steps = backend.compile(
            decode_steps, static=("k", "decode_block", "top_k", *static), donate=donate
        )
        self._choosing = get_backend("numpy") if backend.samples_on_host else backend
        self._choose = choose if backend.samples_on_host else backend.compile(choose, static=("top_k", "xp"))
        self._allowed = self._allowed_ids()

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        max_tokens: int | None,
        stops: Sequence[str],
        ignore_eos: bool,
        speculate: bool,
        called: float,
    ) -> Iterator[Piece]:
        """Continue all prompts together, yielding text as it comes and, at the end, each row's result.

        `called` is the `time.perf_counter()` at which the user's call began.
        """
        rows = [self._row(prompt, max_tokens, stops, ignore_eos) for prompt in prompts]
        n_new = max(row.limit for row in rows) + (WIDTH if speculate else 0)  # with room for what is refused
        clock = Clock(self.backend)
        with clock.measure("prefill"):
            logits, cache, used = self.prefill([prompt.token_ids for prompt in prompts], n_new)
            choice = self._sample(logits, rows, sampling, step=0)
        time_to_first_token = time.perf_counter() - called
        yield from _take(rows, choice)
        state = Run(rows, sampling, clock, choice, cache, used)
        decode = self._speculate if speculate else self._in_blocks if self.backend.decode_block else self._one_by_one
        choices = decode(state)
        while any(state.alive):
            yield from _take(rows, next(choices))
        stats = Stats(
            rows=len(rows),
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            generated_tokens=sum(len(row.token_ids) for row in rows),
            compile_seconds=clock.compile,
            prefill_seconds=clock.prefill,
            decode_seconds=clock.decode,
            time_to_first_token=time_to_first_token,
            peak_memory_bytes=self.backend.peak_memory(),
            backend=self.backend.name,
            device=self.backend.device,
            dtype=self.backend.dtype,
            quantize=quantization_of(self.params),
            proposed_tokens=state.proposed,
            accepted_tokens=state.accepted,
        )
        for index, row in enumerate(rows):
            yield Piece("", index, result=row.result(stats))

    def _one_by_one(self, run: Run) -> Iterator[Choice]:
        """Decode without end; yield each choice."""
        while True:
            yield self._next(run)

    def _in_blocks(self, run: Run) -> Iterator[Choice]:
        """Decode without end, `BLOCK` tokens at a time; yield the choices of `_one_by_one`."""
        noise = self._block_noise(run, run.step)
        while True:
            with run.clock.measure("decode"):
                chosen = self._start_block(run, noise)
                # The device computes, and the host draws what the next block needs.
                noise = self._block_noise(run, run.step + BLOCK)
                arrays = [self.backend.to_numpy(array) for array in chosen]
            for each in zip(*arrays, strict=True):
                run.choice = _finite(Choice(*each), self.backend)
                run.step += 1
                yield run.choice

    def _start_block(self, run: Run, noise: "np.ndarray[Any, Any] | None") -> Choice:
        """Return the next `BLOCK` choices, [BLOCK, batch] each, which the device may still be computing."""
        asarray, numbers = self.backend.asarray, run.sampling.numbers
        run.used += BLOCK
        cache, window = self._fitting(run.cache, run.used)
        choices, run.cache = self._decode_steps(
            self.params,
            token=asarray(np.asarray(run.choice.token, dtype=np.int32)),
            cache=cache,
            seen=None if numbers["repetition_penalty"] is None else asarray(self._seen(run.rows)),
            noise=None if noise is None else asarray(noise),
            allowed=self._allowed,
            k=BLOCK,
            decode_block=self.backend.decode_block,
            config=self.config,
            window=window,
            xp=self.backend.xp,
            **numbers,
        )
        return cast(Choice, choices)

    def _block_noise(self, run: Run, step: int) -> "np.ndarray[Any, Any] | None":
        """The noise [BLOCK, batch, n_vocab] of the block that begins at `step`; zeros where no row goes on."""
        last = max(row.limit for row in run.rows)
        if run.sampling.temperature == 0 or step >= last:
            return None
        noise = np.zeros((BLOCK, len(run.rows), self.config.n_vocab), dtype=np.float32)
        for index in range(min(BLOCK, last - step)):
            noise[index] = self._noise(run.rows, run.sampling.seed, step + index)
        return noise

    def _speculate(self, run: Run) -> Iterator[Choice]:
        """Decode without end, several tokens at a time where it pays; yield the choices of `_one_by_one`."""
        speculation = Speculation([row.prompt.token_ids for row in run.rows])
        speculation.append(run.choice.token, run.alive)
        while True:
            step, began = run.step, run.clock.decode
            # Where the ring begins again, a wrong guess would destroy.
            fits = run.used + WIDTH <= (self._most_slots() if self.backend.grown else run.cache.n_slots)
            proposed = speculation.propose(run.alive) if fits else None
            for choice in [self._next(run)] if proposed is None else self._verify(run, proposed):
                speculation.append(choice.token, run.alive)
                yield choice
            seconds = run.clock.decode - began
            if proposed is None:
                speculation.account.add_step(seconds)
            else:
                speculation.account.add_pass(run.step - step, seconds)

    def _next(self, run: Run) -> Choice:
        """Decode one token of each row."""
        with run.clock.measure("decode"):
            logits, run.cache, run.used = self.decode(run.choice.token, run.cache, run.used)
            run.choice = self._sample(logits, run.rows, run.sampling, run.step)
        run.step += 1
        return run.choice

    def _verify(self, run: Run, proposed: "np.ndarray[Any, Any]") -> Iterator[Choice]:
        """Decode the latest tokens and those proposed after them [batch, WIDTH - 1] in one pass.

        Yield the choice after each, up to the first that is not what was proposed: it is right too.
        """
        tokens = np.column_stack([run.choice.token, proposed]).astype(np.int32)
        with run.clock.measure("decode"):
            cache, window = self._fitting(run.cache, run.used + WIDTH)
            each, cache = self._each_logits(
                self.params, self.backend.asarray(tokens), cache,
                config=self.config, window=window, xp=self.backend.xp,
            )  # fmt: skip
        run.proposed += proposed.shape[1] * sum(run.alive)
        for position, logits in enumerate(each):
            with run.clock.measure("decode"):
                run.choice = self._sample(logits, run.rows, run.sampling, run.step)
            run.step, run.used = run.step + 1, run.used + 1
            agrees = agree(run.choice.token, proposed, position, run.alive)
            run.accepted += agrees * sum(run.alive)
            yield run.choice
            if not agrees:
                break
        run.cache = cache._replace(position=run.used)  # what was refused is looked at by nobody, and overwritten

    def prefill(self, prompts: Sequence[Sequence[int]], n_new: int) -> tuple[Array, KVCache, int]:
        """Run the prompts; return logits [batch, n_vocab] after the last token of each, the cache, and its used slots.

        The cache has room for `n_new` more tokens of each row.
        """
        length = self.backend.piece(len(prompts))
        tokens, cache, total = self._begin(prompts, n_new, length)
        for begin in range(0, total, length):
            piece, cache, window = self._piece(tokens, begin, cache, length)
            logits, cache = self._step(piece, cache, min(length, total - begin), window)
        return logits, cache, total

    def decode(self, token: Any, cache: KVCache, used: int) -> tuple[Array, KVCache, int]:
        """Run one more token [batch] of each row; return as `prefill` does."""
        used += 1
        cache, window = self._fitting(cache, used)
        tokens = self.backend.asarray(np.asarray(token, dtype=np.int32)[:, None])
        logits, cache = self._step(tokens, cache, 1, window)
        return logits, cache, used

    def _step(self, tokens: Array, cache: KVCache, count: int, window: int) -> tuple[Array, KVCache]:
        stepped: tuple[Array, KVCache] = self._last_logits(
            self.params, tokens, cache, count, config=self.config, window=window, xp=self.backend.xp
        )
        return stepped

    def logits(self, token_ids: Any) -> Iterator["np.ndarray[Any, Any]"]:
        """Yield the logits at all positions, [batch, piece, n_vocab] on the host, piece by piece."""
        length = self.backend.piece(len(token_ids))
        tokens, cache, total = self._begin(token_ids, n_new=0, length=length)
        for begin in range(0, total, length):
            piece, cache, window = self._piece(tokens, begin, cache, length)
            logits, cache = self._all_logits(
                self.params, piece, cache, config=self.config, window=window, xp=self.backend.xp
            )
            yield self.backend.to_numpy(logits)[:, : min(length, total - begin)]

    def _begin(
        self, prompts: Sequence[Sequence[int]], n_new: int, length: int = PIECE
    ) -> tuple["np.ndarray[Any, Any]", KVCache, int]:
        """Pad the prompts on the left to one length, and make a cache for them: tokens [batch, total], cache, total.

        The cache has slots for `n_new` more tokens, or, where it grows, for the first `length`.
        """
        total = max(len(prompt) for prompt in prompts)
        tokens = np.zeros((len(prompts), total), dtype=np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[total - len(prompt) :] = prompt
        start = self.backend.asarray(np.asarray([total - len(prompt) for prompt in prompts], dtype=np.int32))
        n_tokens = min(total, length) if self.backend.grown else min(total + n_new, self.config.n_ctx)
        n_slots = self.backend.slots(n_tokens, self.config.n_ctx)
        cache = self._new_cache(
            config=self.config, like=self.params["wpe"], n_slots=n_slots, start=start, xp=self.backend.xp
        )
        return tokens, cache, total

    def _piece(
        self, tokens: "np.ndarray[Any, Any]", begin: int, cache: KVCache, length: int = PIECE
    ) -> tuple[Array, KVCache, int]:
        """Return the piece of tokens [batch, total] that begins at `begin`, on the device, with cache and window."""
        piece = tokens[:, begin : begin + length]
        padding = self.backend.pad(piece.shape[1], tokens.shape[1]) - piece.shape[1]
        piece = np.pad(piece, ((0, 0), (0, padding)))
        return self.backend.asarray(piece), *self._fitting(cache, begin + piece.shape[1])

    def _fitting(self, cache: KVCache, used: int) -> tuple[KVCache, int]:
        """Return the cache, larger if it must be for so many tokens, and at how many of its slots to look."""
        window, grown = self.backend.window(used), self.backend.grown
        if grown and cache.n_slots < (n_slots := min(window, self._most_slots())):
            cache = grown(cache, n_slots)
        return cache, min(window, cache.n_slots)

    def _most_slots(self) -> int:
        return self.backend.slots(self.config.n_ctx, self.config.n_ctx)

    def _row(self, prompt: Prompt, max_tokens: int | None, stops: Sequence[str], ignore_eos: bool) -> Row:
        # The last token needs no room: nothing is computed from it.
        room = self.config.n_ctx - len(prompt.token_ids) + 1
        limit, reason = (room, "context") if max_tokens is None or max_tokens > room else (max_tokens, "max_tokens")
        return Row(
            prompt, TextStream(self.tokenizer, stops), limit, reason, frozenset() if ignore_eos else self.end_tokens
        )

    def _sample(self, logits: Array, rows: Sequence[Row], sampling: Sampling, step: int) -> Choice:
        """Choose the next token of each row; the `Choice` holds NumPy arrays."""
        host, numbers = self.backend.samples_on_host, sampling.numbers
        if self.backend.choose_likeliest and numbers["temperature"] is numbers["repetition_penalty"] is None:
            return _finite(self.backend.choose_likeliest(logits, self._allowed), self.backend)
        asarray = np.asarray if host else self.backend.asarray
        arguments = numbers | {
            "seen": None if numbers["repetition_penalty"] is None else asarray(self._seen(rows)),
            "allowed": self._allowed,
            "xp": self._choosing.xp,
        }
        if host:
            logits = self.backend.to_numpy(logits)
        if host and numbers["top_k"] is not None:

            def draw(row: int, ids: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
                return gumbel_noise(sampling.seed, rows[row].prompt.sample, step, self.config.n_vocab, ids)

            return _finite(choose_among_few(logits, draw, **arguments), self.backend)
        noise = None if numbers["temperature"] is None else asarray(self._noise(rows, sampling.seed, step))
        choice = self._choose(logits, noise=noise, **arguments)
        if not host:
            choice = Choice(*map(self.backend.to_numpy, choice))
        return _finite(choice, self.backend)

    def _noise(self, rows: Sequence[Row], seed: int, step: int) -> "np.ndarray[Any, Any]":
        return np.stack([gumbel_noise(seed, row.prompt.sample, step, self.config.n_vocab) for row in rows])

    def _seen(self, rows: Sequence[Row]) -> "np.ndarray[Any, Any]":
        """Which tokens each row holds so far: [batch, n_vocab] bool."""
        seen = np.zeros((len(rows), self.config.n_vocab), dtype=np.bool_)
        for mark, row in zip(seen, rows, strict=True):
            mark[list(row.prompt.token_ids)] = True
            mark[row.token_ids] = True
        return seen

    def _allowed_ids(self) -> Array | None:
        """Return which ids have a token [n_vocab], and may be chosen; None if all have. It is where they are chosen."""
        tokenizer, n_vocab = self.tokenizer, self.config.n_vocab
        if tokenizer is None or len(tokenizer) == tokenizer.n_vocab >= n_vocab:
            return None
        allowed = np.zeros(n_vocab, dtype=np.bool_)
        allowed[[id for id in tokenizer.ids if id < n_vocab]] = True
        return allowed if self.backend.samples_on_host else self.backend.asarray(allowed)


def _roles(config: GPT2Config, tokenizer: Tokenizer | None) -> tuple[frozenset[int], int | None]:
    """Return the tokens that end a text, and the one that begins an empty one: the config's, else the tokenizer's."""
    own = (None, None) if tokenizer is None else (tokenizer.eos_token_id, tokenizer.bos_token_id)

    def in_table(*ids: int | None) -> list[int]:  # no model can choose another, nor take it
        return [id for id in ids if id is not None and id < config.n_vocab]

    end = in_table(*config.end_tokens) or in_table(own[0])
    return frozenset(end), next(iter(in_table(config.bos_token_id, own[1], *end)), None)


def _finite(choice: Choice, backend: Backend) -> Choice:
    """Return the choice, of NumPy arrays, as it is. Raises `NumericalError` where the model computed no numbers."""
    if not np.isfinite(choice.logprob).all():
        raise NumericalError(
            f"the model's logits are not finite in {backend.dtype}: its weights are damaged (NaN), "
            "or need a wider dtype"
        )
    return choice


def _take(rows: Sequence[Row], choice: Choice) -> Iterator[Piece]:
    for index, row in enumerate(rows):
        if row.finish_reason is None:
            token = int(choice.token[index])
            text = row.take(token, float(choice.logprob[index]), float(choice.margin[index]))
            yield Piece(text, index, None if token in row.end_tokens else token)
