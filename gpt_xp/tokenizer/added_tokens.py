"""Find tokens in text that were added to a vocabulary.

Sources: `AddedToken` in transformers, and `AddedVocabulary` in Hugging Face's tokenizers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import regex

# Unicode defines the parts of a word and white space, as in Hugging Face's tokenizers.
_WORD_CHARACTER = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_WORD_BEFORE, _WORD_AFTER = regex.compile(rf"(?r){_WORD_CHARACTER}\Z"), regex.compile(_WORD_CHARACTER)
_SPACE_BEFORE, _SPACE_AFTER = regex.compile(r"(?r)\p{White_Space}*\Z"), regex.compile(r"\p{White_Space}*")


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary. `content` in a text becomes this token, and is never cut by merges.

    A `special` token is found only where special tokens are allowed. `lstrip` and `rstrip` take the white space before
    and after it along. A `single_word` token is found only between characters that are not part of a word. Tokens that
    are not `normalized` are searched for first. These are the definitions of transformers and tokenizers.
    """

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokens:
    """Finds added tokens in text, as `AddedVocabulary` of Hugging Face's tokenizers does."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        # Tokens that are not normalized are found first. Then the others are found in the rest of the text.
        groups = ([each for each in self._tokens.values() if each.normalized is flag] for flag in (False, True))
        self._patterns = [_any_of(token.content for token in group) for group in groups if group]
        # `text_files` cuts where white space begins. Only these tokens can cross such a place.
        crossing = [each.content for each in self._tokens.values() if each.rstrip or regex.search(r"\s", each.content)]
        self._crossing = _any_of(crossing) if crossing else None
        self._longest_crossing = max(map(len, crossing), default=0)

    def split(self, text: str) -> Iterable[tuple[str, bool]]:
        """Return the parts of `text` in order: the content of an added token and True, or other text and False."""
        parts = [(text, False)]
        for pattern in self._patterns:
            parts = [
                each
                for part, is_added in parts
                for each in ([(part, True)] if is_added else self._split_by(pattern, part))
            ]
        return parts

    def _split_by(self, pattern: Any, text: str) -> Iterator[tuple[str, bool]]:
        done = 0
        for match in pattern.finditer(text):
            token, (begin, end) = self._tokens[match.group()], match.span()
            if token.single_word and (_WORD_BEFORE.search(text, 0, begin) or _WORD_AFTER.match(text, end)):
                continue
            if token.lstrip:
                begin = max(begin - len(_SPACE_BEFORE.search(text, 0, begin).group()), done)
            if token.rstrip:
                end = _SPACE_AFTER.match(text, end).end()
            if begin > done:
                yield text[done:begin], False
            if begin < end:  # The token before it may have taken all of it as white space.
                yield token.content, True
            done = end
        if done < len(text):
            yield text[done:], False

    def uncut(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the same text in pieces that never end within an added token or the white space it takes."""
        held: str | None = None
        for piece in pieces:
            if held is None or self._is_cut(held, piece):
                held = piece if held is None else held + piece
            else:
                yield held
                held = piece
        if held is not None:
            yield held

    def _is_cut(self, before: str, after: str) -> bool:
        if self._crossing is None:
            return False
        tail = before[-self._longest_crossing :]
        around = tail + after[: self._longest_crossing]
        # A token that ends or begins at the cut counts too. `single_word` needs the character on the other side.
        matches = self._crossing.finditer(around, overlapped=True)
        return any(match.start() <= len(tail) <= match.end() for match in matches)


def _any_of(contents: Iterable[str]) -> Any:
    """Return a pattern that finds the longest of the strings at the leftmost place."""
    return regex.compile("|".join(map(regex.escape, sorted(contents, key=len, reverse=True))))
