"""GPT-2's byte-level BPE: text -> token ids -> text.

Text is cut into words by a pattern. The UTF-8 bytes of a word are its first tokens; then neighbours are merged,
the earliest learned merge first, until no two neighbours are a merge. Every byte is a token, so all text has
tokens. In the files a byte is written as a printable character: the space as 'Ġ', so ' all' as 'Ġall'.

Sources: Radford et al. 2019, section 2.2; Sennrich et al. 2016 for BPE; the pattern and the characters that
stand for bytes are those of `encoder.py` in openai/gpt-2.
"""

import heapq
import itertools
import json
import operator
import os
from collections.abc import Iterable, KeysView, Mapping
from pathlib import Path
from typing import Any, Self

import regex

from gpt_xp.errors import CheckpointError, TokenizerError
from gpt_xp.tokenizer_files import (
    ADDED_TOKENS,
    IN_MEMORY,
    MERGES,
    PAIRS,
    TOKENIZER_JSON,
    VOCAB,
    Places,
    read_pair,
    read_tokenizer_json,
    what_is_missing,
    write_all,
)

EOS = "<|endoftext|>"

# A word is a contraction, or letters, digits or other marks with the space before them, or whitespace, which
# leaves its last character to the word that follows: "a   b" is "a", "  ", " b".
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

CACHED_WORDS = 50_000
LONGEST_CACHED_WORD = 50  # longer ones seldom come twice, and would let the cache grow without bound


def _byte_characters() -> list[str]:
    """The character that stands for each byte: its own in Latin-1 if that is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}  # 0xAD is the soft hyphen
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


class Tokenizer:
    """Byte-level BPE with a given vocabulary.

    `encoder` maps token strings to ids, `decoder` back. Ids may have gaps: `ids` are those that have a token, and
    `n_vocab` is one more than the largest. `special_tokens` come out of text only where they are allowed;
    `<|endoftext|>` is always one of them, and `eos_token_id` is its id, or None without it.
    """

    def __init__(
        self,
        encoder: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        special_tokens: Iterable[str] = (),
        _places: Places = IN_MEMORY,
    ) -> None:
        """Raises `TokenizerError` if vocabulary, merges and special tokens do not fit each other."""
        self.encoder = dict(encoder)
        same = dict(zip(self.encoder, self.encoder, strict=True))  # merges are of tokens: each string is held once
        self.merges = [(same.get(left, left), same.get(right, right)) for left, right in merges]
        self.special_tokens = frozenset(special_tokens) | ({EOS} & self.encoder.keys())
        _check_parts(self.encoder, self.merges, self.special_tokens, _places)
        self.decoder = {id: token for token, id in self.encoder.items()}
        self.n_vocab = max(self.decoder) + 1
        self.eos_token_id = self.encoder.get(EOS)
        self._rank: dict[tuple[str | None, str | None], int] = {merge: rank for rank, merge in enumerate(self.merges)}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = regex.compile(f"({'|'.join(map(regex.escape, longest_first))})")
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Self:
        """The tokenizer in `directory`, from the first of these that is complete.

        `tokenizer.json` (it alone can say that a tokenizer is not GPT-2's, so it is never passed over); then
        `vocab.json` + `merges.txt`, with `added_tokens.json` if there is one; then `encoder.json` + `vocab.bpe`.
        Raises `TokenizerError`, with file and line or field, for what is missing, malformed or not GPT-2's.
        """
        folder = Path(directory)
        if (folder / TOKENIZER_JSON).exists():
            return cls(*read_tokenizer_json(folder / TOKENIZER_JSON))
        for vocab, merges in PAIRS:
            if (folder / vocab).exists() and (folder / merges).exists():
                return cls(*read_pair(folder / vocab, folder / merges))
        raise TokenizerError(what_is_missing(folder))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `vocab.json` and `merges.txt`, which `from_directory` and transformers read back.

        Special tokens other than `<|endoftext|>` are also named in `added_tokens.json`. Raises `CheckpointError`, and
        leaves no temporary file, if the files cannot be written, or as `check_place` does.
        """
        folder = Path(directory)
        self.check_place(folder)
        vocabulary = {token: id for id, token in sorted(self.decoder.items())}
        added = {token: id for token, id in vocabulary.items() if token in self.special_tokens - {EOS}}
        files = {
            VOCAB: json.dumps(vocabulary, ensure_ascii=False),
            MERGES: "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in self.merges)]),
        }
        if added or (folder / ADDED_TOKENS).exists():  # an older one must not add its tokens to this vocabulary
            files[ADDED_TOKENS] = json.dumps(added, ensure_ascii=False)
        try:
            write_all(folder, files)
        except OSError as error:
            raise CheckpointError(f"the tokenizer cannot be written to {folder}: {error}") from error

    def check_place(self, directory: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` if a `tokenizer.json` of another tokenizer would be read in place of this one."""
        path = Path(directory) / TOKENIZER_JSON
        if path.exists():
            try:
                there = type(self)(*read_tokenizer_json(path))
            except TokenizerError:
                there = None
            if there is None or (there.encoder, there.merges) != (self.encoder, self.merges):
                raise CheckpointError(
                    f"{path} would be read in place of the tokenizer to be saved there, and is another: "
                    "remove it, or choose another directory"
                )

    @property
    def ids(self) -> KeysView[int]:
        """The ids that have a token."""
        return self.decoder.keys()

    def __len__(self) -> int:
        """How many tokens there are; `n_vocab` is larger where the ids have gaps."""
        return len(self.encoder)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; `<|endoftext|>` and the like are plain text unless `allow_special`.

        Raises `TokenizerError` for text that has no UTF-8 form (lone surrogates).
        """
        check_text(text)
        if not (allow_special and self.special_tokens):
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._special.split(text):
            ids += [self.encoder[part]] if part in self.special_tokens else self._encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of `ids`; `errors`, as in `bytes.decode`, says what becomes of incomplete characters.

        Raises `TokenizerError` for ids without a token, and with `errors="strict"` for incomplete characters.
        """
        try:
            return self.decode_bytes(ids).decode("utf-8", errors)
        except (UnicodeDecodeError, LookupError) as error:
            raise TokenizerError(f"the ids are no text with errors={errors!r}: {error}") from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, perhaps with incomplete characters. Raises `TokenizerError` as `token_bytes` does."""
        try:
            each = iter(ids)
        except TypeError:
            raise TokenizerError(f"expected a sequence of token ids, not {ids!r}") from None
        return b"".join(map(self.token_bytes, each))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. Raises `TokenizerError` if `id` has no token or is not an integer."""
        try:
            token = self.decoder[_integer(id)]
        except KeyError:
            gaps = "" if len(self) == self.n_vocab else ", with gaps"
            raise TokenizerError(f"token id {id} has no token: ids are 0 to {self.n_vocab - 1}{gaps}") from None
        if not BYTE_OF_CHARACTER.keys() >= set(token) or self._is_literal(token):
            return token.encode()
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, token))

    def _is_literal(self, token: str) -> bool:
        """Whether `token` stands for its own characters: a special one, unless ordinary text can become it too."""
        return (
            token in self.special_tokens
            and token not in BYTE_OF_CHARACTER
            and not any(left + right == token for left, right in self.merges)
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in WORD.finditer(text):
            word = match.group()
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        characters = [CHARACTER_OF_BYTE[byte] for byte in word.encode()]
        ids = [self.encoder[token] for token in self._merged(characters)]
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()  # simpler than forgetting the oldest, and common words are soon back
            self._cache[word] = ids
        return ids

    def _merged(self, characters: list[str]) -> list[str]:
        """The tokens of a word after all merges: each time the one of lowest rank, and of several such the leftmost.

        O(n log n): a heap holds the merges that are possible, two linked lists the neighbours. The lists are rings
        closed by a place without a token, so that the first and the last token too have two neighbours.
        """
        tokens = [*characters, None]
        size = len(tokens)
        before, after = [size - 1, *range(size - 1)], [*range(1, size), 0]
        possible: list[tuple[int, int]] = []

        def rank_at(left: int) -> int | None:
            return self._rank.get((tokens[left], tokens[after[left]]))

        def propose(left: int) -> None:
            if (rank := rank_at(left)) is not None:
                heapq.heappush(possible, (rank, left))

        for place in range(size):
            propose(place)
        while possible:
            rank, left = heapq.heappop(possible)
            if rank_at(left) != rank:
                continue  # another merge has taken one of the two since
            right = after[left]
            tokens[left], tokens[right] = "".join(self.merges[rank]), None
            after[left] = after[right]
            before[after[left]] = left
            propose(before[left])
            propose(left)
        return [token for token in tokens if token is not None]


def _integer(id: Any) -> int:
    """`id` as a Python int; NumPy's integers are integers too, truth values are not."""
    try:
        if not isinstance(id, bool) and str(getattr(id, "dtype", "")) != "bool":
            return operator.index(id)
    except TypeError:
        pass
    raise TokenizerError(f"{id!r} is no token id: expected an integer, not {type(id).__name__}")


def check_text(text: str) -> None:
    """Raises `TokenizerError` for what is not text, or has no UTF-8 form (lone surrogates)."""
    if not isinstance(text, str):
        raise TokenizerError(f"expected text (str), not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which has "
            "no UTF-8 form: remove it, or put '?' there with text.encode('utf-8', 'replace').decode()"
        ) from None


def _check_parts(
    encoder: dict[str, int], merges: list[tuple[str, str]], special_tokens: frozenset[str], places: Places
) -> None:
    """Raises `TokenizerError` where vocabulary, merges and special tokens do not fit each other."""
    for token, id in encoder.items():
        if type(id) is not int or id < 0:
            raise TokenizerError(f"{places.vocabulary}: the id of {token!r} is {id!r}, expected an integer >= 0")
    if len(set(encoder.values())) < len(encoder):
        first, second = _same_id(encoder)
        raise TokenizerError(f"{places.vocabulary}: {first!r} and {second!r} have the same id {encoder[first]}")
    try:
        "".join(encoder).encode()  # all at once: there are 50 000 of them
    except UnicodeEncodeError as error:
        token = next(token for token in encoder if error.object[error.start] in token)
        raise TokenizerError(f"{places.vocabulary}: {token!r} has a lone surrogate, so it is not text") from None
    for byte, character in enumerate(CHARACTER_OF_BYTE):
        if character not in encoder:
            raise TokenizerError(f"{places.vocabulary}: not byte-level BPE: no {character!r} for byte {byte:#04x}")
    # All at once, and one by one only to say which is wrong.
    known = encoder.__contains__
    fit = all(map(known, itertools.chain.from_iterable(merges))) and all(map(known, map("".join, merges)))
    for rank, (left, right) in enumerate(() if fit and EOS not in map("".join, merges) else merges):
        for token in (left, right, left + right):
            if token not in encoder:
                raise TokenizerError(f"{places.merge(rank)}: {left!r} + {right!r}: {token!r} has no id")
        if left + right == EOS:
            raise TokenizerError(f"{places.merge(rank)}: makes {EOS}, which text must not become by itself")
    for token in special_tokens:
        if not token or token not in encoder:
            raise TokenizerError(f"{places.vocabulary}: special token {token!r} is empty or has no id")


def _same_id(encoder: dict[str, int]) -> tuple[str, str]:
    """The first two tokens with the same id."""
    first: dict[int, str] = {}
    return next((first[id], token) for token, id in encoder.items() if first.setdefault(id, token) != token)
