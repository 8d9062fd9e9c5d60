"""Cut text into words, write their bytes as characters, and merge the tokens of one word.

The pattern and the characters are those of `encoder.py` in openai/gpt-2.
"""

import heapq
from collections.abc import Mapping

import regex

from gpt_xp.errors import TokenizerError

EOS = "<|endoftext|>"

# A word is a contraction, or letters, digits or other marks with the space before them, or whitespace. Whitespace
# leaves its last character to the next word: "a   b" is "a", "  ", " b".
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte: the Latin-1 one if it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}  # 0xAD is the soft hyphen.
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


def check_text(text: str) -> str:
    """Return the text. Raises `TokenizerError` for a value that is no text, or has no UTF-8 form (lone surrogates)."""
    if not isinstance(text, str):
        raise TokenizerError(f"expected text (str), not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which has "
            "no UTF-8 form: remove it, or put '?' there with text.encode('utf-8', 'replace').decode()"
        ) from None
    return text


def merge_word(characters: list[str], rank_of: Mapping[tuple[str | None, str | None], int]) -> list[str]:
    """Return the tokens of a word after all merges: the lowest rank first, and the leftmost of equal ranks.

    This takes O(n log n). A heap holds the possible merges, and two linked lists hold the neighbours. A place without a
    token closes the lists to rings, so that the first and the last token have two neighbours too.
    """
    # None marks a place without a token. A merge leaves one on its right.
    tokens: list[str | None] = [*characters, None]
    size = len(tokens)
    before, after = [size - 1, *range(size - 1)], [*range(1, size), 0]
    possible: list[tuple[int, int]] = []

    def rank_at(left: int) -> int | None:
        return rank_of.get((tokens[left], tokens[after[left]]))

    def propose(left: int) -> None:
        if (rank := rank_at(left)) is not None:
            heapq.heappush(possible, (rank, left))

    for place in range(size):
        propose(place)
    while possible:
        rank, left = heapq.heappop(possible)
        if rank_at(left) != rank:
            continue  # Another merge has already used one of the two.
        right = after[left]
        tokens[left], tokens[right] = f"{tokens[left]}{tokens[right]}", None
        after[left] = after[right]
        before[after[left]] = left
        propose(before[left])
        propose(left)
    return [token for token in tokens if token is not None]
