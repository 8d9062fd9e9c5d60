"""A row of a batch: its prompt, and the continuation so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt_xp.generation.results import Generation, Stats
from gpt_xp.generation.stop_strings import TextStream


@dataclass(frozen=True)
class Prompt:
    """The prompt of one row: its token ids, the number of the sample among those of the same prompt, and its seed."""

    token_ids: Sequence[int]
    sample: int = 0
    seed: int = 0


@dataclass
class RowState:
    """A prompt while it is being continued."""

    prompt: Prompt
    stream: TextStream
    limit: int  # the most tokens to generate
    limit_reason: str  # the `finish_reason` at that limit
    end_tokens: frozenset[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, token: int, logprob: float, margin: float) -> str:
        """Add a token; return the text that it releases, and set `finish_reason` if it is the last."""
        text = ""
        if token in self.end_tokens:
            self.finish_reason = "eos"
        else:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.margins.append(margin)
            text = self.stream.push(token)
            if len(self.token_ids) == self.limit:
                self.finish_reason = self.limit_reason
        if self.finish_reason:
            text += self.stream.finish()
        if self.stream.stopped:
            self.finish_reason = "stop"
        self.text += text
        return text

    def result(self, stats: Stats) -> Generation:
        """Return the finished continuation."""
        assert self.finish_reason is not None
        return Generation(self.text, self.token_ids, self.logprobs, self.margins, self.finish_reason, stats)
