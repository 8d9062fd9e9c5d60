"""From tokens, one at a time, to text that can be shown at once."""

import codecs
from collections.abc import Sequence

from gpt_xp.tokenizer.bpe import Tokenizer


class TextStream:
    """The text of one row, released as early as is safe.

    Only whole characters are released: a token may end inside a UTF-8 sequence. And of the end of the text, whatever
    may be the beginning of a stop string is held back until the next token shows whether it is.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that this token releases, often none; sets `stopped` when a stop string is complete."""
        return "" if self._tokenizer is None else self._release(self._tokenizer.token_bytes(token), final=False)

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
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
    """How many characters at the end of `text` are also the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
