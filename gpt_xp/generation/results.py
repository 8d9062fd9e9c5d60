"""What generation takes and gives: prompts, pieces of text, finished continuations, statistics; and a row under way."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What one call of `generate` did, over all its rows. Seconds are wall time.

    `prefill_seconds` and `decode_seconds` (after the first token) leave out compiling, which `compile_seconds` counts;
    `time_to_first_token` counts everything from the call on.
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
    proposed_tokens: int = 0  # by speculation, and how many of them were what the model chose
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens per second of prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Generated tokens, but the first of each row, per second of decode; None if there are none."""
        later = self.generated_tokens - self.rows
        return later / self.decode_seconds if self.decode_seconds and later > 0 else None


@dataclass(frozen=True)
class Generation:
    """A continuation.

    `text` is the continuation alone and ends before a stop string; `token_ids` holds every generated id but that of
    an end token, with a natural `logprobs` and a `margins` entry each (see `sampling.Choice`). `finish_reason` is
    "eos" (an end token), "stop" (a stop string), "max_tokens", or "context" (no room is left).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class Piece:
    """A part of a stream: what one token adds to row `index`.

    `text` is empty while a character or a possible stop string is incomplete; `token_id` is None for an end token.
    The last piece of each row adds nothing and carries the whole `result`.
    """

    text: str
    index: int = 0
    token_id: int | None = None
    result: Generation | None = None
