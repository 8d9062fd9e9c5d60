"""The results of generation: pieces of text, finished continuations, statistics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """The statistics of one call of `generate`, over all its rows. Seconds are wall time.

    `prefill_seconds` and `decode_seconds` (after the first token) exclude compiling, which `compile_seconds` counts.
    `time_to_first_token` includes everything from the call on.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float = 0.0
    peak_memory_bytes: int | None = None
    backend: str = ""
    device: str = ""
    dtype: str = ""
    quantize: str | None = None
    rows: int = 1
    proposed_tokens: int = 0  # tokens that speculation guessed
    accepted_tokens: int = 0  # guessed tokens that the model chose too

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens per second of prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Generated tokens per second of decode, without the first token of each row; None if there are no others."""
        later = self.generated_tokens - self.rows
        return later / self.decode_seconds if self.decode_seconds and later > 0 else None


@dataclass(frozen=True)
class Generation:
    """A finished continuation.

    `text` is the continuation without the prompt; it ends before a stop string. `token_ids` holds every generated id
    except an end token's, and `logprobs` (natural) and `margins` have an entry for each (see `sampling.Choice`).
    `finish_reason` is "eos" (an end token), "stop" (a stop string), "max_tokens", or "context" (the context is full).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class Piece:
    """A part of a stream: the text that one token adds to row `index`.

    `text` is empty while a character or a possible stop string is incomplete. `token_id` is None for an end token.
    The last piece of each row adds no text and holds the whole `result`.
    """

    text: str
    index: int = 0
    token_id: int | None = None
    result: Generation | None = None
