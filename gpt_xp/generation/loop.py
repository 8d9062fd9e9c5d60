"""The generation loop: prefill, then decode tokens one by one, in blocks, or with speculation.

With speculation, a step runs several guessed tokens and keeps those that decoding would have chosen: the same text in
fewer steps. On a backend with a `decode_block`, the device chooses the tokens, and the host sees a block at a time.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt_xp.backend import Backend
from gpt_xp.config import GPT2Config
from gpt_xp.generation.choosing import Chooser, Choosing, checked
from gpt_xp.generation.decoder import Decoder
from gpt_xp.generation.results import Piece, Stats
from gpt_xp.generation.rows import Prompt, RowState
from gpt_xp.generation.sampling import Choice
from gpt_xp.generation.speculation import PASS_TOKENS, Speculation, agree
from gpt_xp.generation.stop_strings import TextStream
from gpt_xp.kv_cache import KVCache
from gpt_xp.quantization import quantization_of
from gpt_xp.settings import GenerationSettings
from gpt_xp.tokenizer.bpe import Tokenizer

BLOCK_STEPS = 16  # steps of a `decode_block`; those after the end of a text, in its last block, are wasted


class Clock:
    """Adds up the seconds of each phase, and counts compiling separately."""

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
class DecodeState:
    """A generation between two steps."""

    decoder: Decoder
    rows: Sequence[RowState]
    choosing: Choosing
    clock: Clock
    cache: KVCache
    choice: Choice  # the latest, not yet in the cache
    step: int = 0  # the number of the latest choice
    proposed: int = 0  # tokens guessed, over all rows
    accepted: int = 0

    @property
    def alive(self) -> list[bool]:
        """A flag for each row, [batch]: True until the row is finished."""
        return [row.finish_reason is None for row in self.rows]

    def choose(self, logits: Any) -> Choice:
        """Choose the tokens of the next step from its logits, and continue with them."""
        self.step += 1
        return self.take(self.choosing.choose(logits, self.step))

    def take(self, choice: Choice) -> Choice:
        """Continue with this choice, and return it."""
        self.choice = choice
        self.choosing.add(choice.token)
        return choice


class Generator:
    """Continues prompts with a model; it knows the end tokens and how to choose tokens."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.chooser = Chooser(decoder.config, tokenizer, decoder.backend)
        self.end_tokens, self.first_token = _roles(decoder.config, tokenizer)

    def run(self, prompts: Sequence[Prompt], settings: GenerationSettings, called: float) -> Iterator[Piece]:
        """Continue all prompts together; yield text as it is generated and, at the end, each row's result.

        `called` is the `time.perf_counter()` at which the user's call began.
        """
        rows = [self._row(prompt, settings) for prompt in prompts]
        state = self._prefill([*rows, *self._idle_rows(rows)], settings)
        time_to_first_token = time.perf_counter() - called
        yield from _pieces(rows, state.choice)
        in_blocks = self.decoder.backend.decode_block is not None
        speculates = settings.speculate and self.decoder.backend.can_speculate
        choices = (_speculating if speculates else _in_blocks if in_blocks else _one_by_one)(state)
        while any(state.alive):
            yield from _pieces(rows, next(choices))
        stats = self._stats(state, rows, time_to_first_token)
        for index, row in enumerate(rows):
            yield Piece("", index, result=row.result(stats))

    def _row(self, prompt: Prompt, settings: GenerationSettings) -> RowState:
        # The last token needs no room, because nothing is computed from it.
        room = self.decoder.config.n_ctx - len(prompt.token_ids) + 1
        limit, reason = room, "context"
        if settings.max_tokens is not None and settings.max_tokens <= room:
            limit, reason = settings.max_tokens, "max_tokens"
        stream = TextStream(self.tokenizer, settings.stop_strings)
        return RowState(prompt, stream, limit, reason, frozenset() if settings.ignore_eos else self.end_tokens)

    def _idle_rows(self, rows: Sequence[RowState]) -> list[RowState]:
        """Return finished rows that fill up the batch, so that several devices have equal parts of it."""
        n_idle = self.decoder.backend.full_batch(len(rows)) - len(rows)
        return [replace(rows[0], finish_reason="idle") for _ in range(n_idle)]

    def _prefill(self, rows: Sequence[RowState], settings: GenerationSettings) -> DecodeState:
        clock, prompts = Clock(self.decoder.backend), [row.prompt for row in rows]
        choosing = Choosing(self.chooser, prompts, settings)
        with clock.measure("prefill"):
            logits, cache = self.decoder.prefill([prompt.token_ids for prompt in prompts])
            choice = choosing.choose(logits, step=0)
        state = DecodeState(self.decoder, rows, choosing, clock, cache, choice)
        state.take(choice)
        return state

    def _stats(self, state: DecodeState, rows: Sequence[RowState], time_to_first_token: float) -> Stats:
        backend, clock = self.decoder.backend, state.clock
        return Stats(
            rows=len(rows),
            prompt_tokens=sum(len(row.prompt.token_ids) for row in rows),
            generated_tokens=sum(len(row.token_ids) for row in rows),
            compile_seconds=clock.compile,
            prefill_seconds=clock.prefill,
            decode_seconds=clock.decode,
            time_to_first_token=time_to_first_token,
            peak_memory_bytes=backend.peak_memory(),
            backend=backend.name,
            device=backend.device,
            dtype=backend.dtype,
            quantize=quantization_of(self.decoder.params),
            proposed_tokens=state.proposed,
            accepted_tokens=state.accepted,
        )


# --- three ways to decode; each yields choices forever ----------------------------------------------------------------


def _one_by_one(state: DecodeState) -> Iterator[Choice]:
    while True:
        yield _next(state)


def _next(state: DecodeState) -> Choice:
    """Decode one token of each row."""
    with state.clock.measure("decode"):
        logits, state.cache = state.decoder.decode(state.choice.token, state.cache)
        return state.choose(logits)


def _in_blocks(state: DecodeState) -> Iterator[Choice]:
    """Decode `BLOCK_STEPS` tokens at a time."""
    backend, choosing, end = state.decoder.backend, state.choosing, max(row.limit for row in state.rows)
    noise = choosing.block_noise(state.step + 1, BLOCK_STEPS, end)
    while True:
        with state.clock.measure("decode"):
            choices, state.cache, choosing.seen = state.decoder.decode_steps(
                state.choice.token, state.cache, BLOCK_STEPS, seen=choosing.seen, allowed=choosing.chooser.allowed,
                noise=None if noise is None else backend.asarray(noise), **choosing.filters,
            )  # fmt: skip
            # The device computes, and the host draws what the next block needs.
            noise = choosing.block_noise(state.step + 1 + BLOCK_STEPS, BLOCK_STEPS, end)
            arrays = [backend.to_numpy(array) for array in choices]
        for each in zip(*arrays, strict=True):
            state.step += 1
            state.choice = checked(Choice(*each), backend)
            yield state.choice


def _speculating(state: DecodeState) -> Iterator[Choice]:
    """Decode several tokens at a time where that saves time, and otherwise one by one."""
    speculation = Speculation([row.prompt.token_ids for row in state.rows])
    speculation.append(state.choice.token, state.alive)
    while True:
        step, began = state.step, state.clock.decode
        has_room = state.decoder.has_room(state.cache, PASS_TOKENS)
        proposed = speculation.propose(state.alive) if has_room else None
        for choice in [_next(state)] if proposed is None else _verify(state, proposed):
            speculation.append(choice.token, state.alive)
            yield choice
        seconds = state.clock.decode - began
        if proposed is None:
            speculation.account.add_step(seconds)
        else:
            speculation.account.add_pass(state.step - step, seconds)


def _verify(state: DecodeState, proposed: "np.ndarray[Any, Any]") -> Iterator[Choice]:
    """Decode the latest tokens and the proposed ones [batch, PASS_TOKENS - 1] in one pass.

    Yield the choice after each, up to and including the first that differs from the proposal, which is right too.
    """
    tokens = np.column_stack([state.choice.token, proposed]).astype(np.int32)
    position, alive = state.cache.position, sum(state.alive)
    with state.clock.measure("decode"):
        candidates, cache = state.decoder.candidate_logits(tokens, state.cache)
    state.proposed += proposed.shape[1] * alive
    for place, logits in enumerate(candidates):
        with state.clock.measure("decode"):
            choice = state.choose(logits)
        position += 1
        agrees = agree(choice.token, proposed, place, state.alive)
        state.accepted += agrees * sum(state.alive)
        yield choice
        if not agrees:
            break
    # The refused tokens are beyond `position`. No token sees them, and the next tokens overwrite them.
    state.cache = cache._replace(position=position)


def _pieces(rows: Sequence[RowState], choice: Choice) -> Iterator[Piece]:
    for index, row in enumerate(rows):
        if row.finish_reason is None:
            token = int(choice.token[index])
            text = row.take(token, float(choice.logprob[index]), float(choice.margin[index]))
            yield Piece(text, index, None if token in row.end_tokens else token)


def _roles(config: GPT2Config, tokenizer: Tokenizer | None) -> tuple[frozenset[int], int | None]:
    """Return the tokens that end a text, and the token that begins an empty prompt: the config's or the tokenizer's."""
    own = (None, None) if tokenizer is None else (tokenizer.eos_token_id, tokenizer.bos_token_id)

    def in_table(*ids: int | None) -> list[int]:  # A model can neither choose nor take an id outside its token table.
        return [id for id in ids if id is not None and id < config.n_vocab]

    end = in_table(*config.end_tokens) or in_table(own[0])
    return frozenset(end), next(iter(in_table(config.bos_token_id, own[1], *end)), None)
