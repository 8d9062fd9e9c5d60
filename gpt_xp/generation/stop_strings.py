"""Decodes tokens to text one at a time, and finds stop strings."""

import codecs
from collections.abc import Sequence

from gpt_xp.tokenizer.bpe import Tokenizer


class TextStream:
    """The text of one row, released as early as possible.

    Only whole characters are released, because a token may end inside a UTF-8 sequence. If the end of the text may be
    the beginning of a stop string, it is held back until the next tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that this token releases, which may be empty. Set `stopped` if a stop string is complete."""
        return "" if self._tokenizer is None else self._release(self._tokenizer.token_bytes(token), final=False)

    def finish(self) -> str:
        """Return the text that was held back, at the end of the generation."""
        return "" if self.stopped else self._release(b"", final=True)

    def _release(self, new: bytes, final: bool) -> str:
        text = self._held + self._decoder.decode(new, final)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that are also the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
