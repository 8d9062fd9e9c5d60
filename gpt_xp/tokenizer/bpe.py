"""Encode text as token ids and decode it, with GPT-2's byte-level BPE.

Text is cut into words by a pattern. The UTF-8 bytes of a word are its first tokens. Then neighbours are merged, the
earliest learned merge first, until no two neighbours are a merge. In GPT-2 every byte is a token, so all text has
tokens. In the files a byte is written as a printable character: the space as 'Ġ', so ' all' as 'Ġall'.

Tokens that were added to a vocabulary later are found in the text first, and the text between them is then encoded.

Sources: Radford et al. 2019, section 2.2; Sennrich et al. 2016 for BPE.
"""

import dataclasses
import itertools
import operator
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any, Self

from gpt_xp.atomic_files import written_together
from gpt_xp.errors import CheckpointError, TokenizerError
from gpt_xp.tokenizer.added_tokens import AddedToken, AddedTokens
from gpt_xp.tokenizer.files import (
    IN_MEMORY,
    SIDE_FILES,
    TOKENIZER_JSON,
    SourceNames,
    TokenizerSpec,
    pair_files,
    read_spec,
    side_files,
)
from gpt_xp.tokenizer.words import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE, EOS, WORD, check_text, merge_word

CACHED_WORDS = 50_000
LONGEST_CACHED_WORD = 50  # Longer words seldom come twice, and would let the cache grow without bound.


class Tokenizer:
    """Byte-level BPE with a given vocabulary.

    `encoder` maps token strings to ids, and `decoder` maps back. Ids may have gaps: `ids` are those that have a token,
    and `n_vocab` is one more than the largest. `added_tokens` are found in text whole. Those that are
    `special_tokens` are found only where special tokens are allowed; `<|endoftext|>` is always one of them.
    `eos_token_id` and `bos_token_id` are the ids of the tokens that end and begin a text. By default both are
    `<|endoftext|>`, or None.
    """

    def __init__(
        self,
        encoder: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        special_tokens: Iterable[str] = (),
        *,
        added_tokens: Iterable[AddedToken] = (),
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos_token: bool = False,
        add_prefix_space: bool = False,
        _source_names: SourceNames = IN_MEMORY,
        _files: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """Make a tokenizer. `special_tokens` are added tokens that are special and take no white space along.

        With `add_bos_token`, a text begins with `bos_token`. With `add_prefix_space`, a space is put before the text,
        and before the text after each added token, where there is none. Raises `TokenizerError` if the parts do not
        fit each other.
        """
        self.encoder = dict(encoder)
        same = dict(zip(self.encoder, self.encoder, strict=True))  # Merges share the strings of the tokens.
        self.merges = [(same.get(left, left), same.get(right, right)) for left, right in merges]
        added = {token: AddedToken(token) for token in [*special_tokens, *({EOS} & self.encoder.keys())]}
        added |= {token.content: token for token in added_tokens}
        if EOS in added:
            added[EOS] = dataclasses.replace(added[EOS], special=True)
        self.added_tokens = tuple(added.values())
        self.special_tokens = frozenset(token.content for token in self.added_tokens if token.special)
        _check_parts(self.encoder, self.merges, added, (bos_token, eos_token), _source_names)
        self.decoder = {id: token for token, id in self.encoder.items()}
        self.n_vocab = max(self.decoder) + 1
        self.bos_token, self.eos_token = (token or (EOS if EOS in added else None) for token in (bos_token, eos_token))
        self.add_bos_token, self.add_prefix_space = add_bos_token, add_prefix_space
        self._files = dict(_files)
        self._rank: dict[tuple[str | None, str | None], int] = {merge: rank for rank, merge in enumerate(self.merges)}
        self._added_words = AddedTokens(token for token in self.added_tokens if not token.special)
        self._all_added = AddedTokens(self.added_tokens)
        self._special = AddedTokens(token for token in self.added_tokens if token.special)
        self._literal = {token for token in added if not self._is_ordinary(token)}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Self:
        """Return the tokenizer in `directory`, from the first of these that is complete.

        `tokenizer.json` (only this file can say that a tokenizer is not GPT-2's, so it is never ignored); then
        `vocab.json` + `merges.txt`, with `added_tokens.json` if there is one; then `encoder.json` + `vocab.bpe`. The
        roles and flags of tokens, `add_bos_token` and `add_prefix_space` are those that `tokenizer_config.json` and
        `special_tokens_map.json` state. Raises `TokenizerError`, with file and line or field, for files that are
        missing, malformed or not GPT-2's.
        """
        return cls._from_spec(read_spec(Path(directory)))

    @classmethod
    def _from_spec(cls, spec: TokenizerSpec) -> Self:
        return cls(
            spec.encoder,
            spec.merges,
            added_tokens=spec.added_tokens,
            bos_token=spec.bos_token,
            eos_token=spec.eos_token,
            add_bos_token=spec.add_bos_token,
            add_prefix_space=spec.add_prefix_space,
            _source_names=spec.source_names,
            _files=spec.files,
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `merges.txt`, which `from_directory` and transformers read back.

        The other files that it was read from (`tokenizer_config.json` and the like) are written as they were. A
        tokenizer that was made in memory writes its added tokens, roles and flags. Raises `CheckpointError` as
        `check_place` does, and if the files cannot be written. Then it leaves no temporary file.
        """
        folder = Path(directory)
        self.check_place(folder)
        files = {
            **pair_files(self.encoder, self.merges),
            # Files of an older tokenizer must not change this one.
            **{name: b"{}" for name in SIDE_FILES if name != TOKENIZER_JSON and (folder / name).exists()},
            **(self._files or self._side_files()),
        }
        try:
            with written_together(folder) as aside:
                for name, content in files.items():
                    Path(aside, name).write_bytes(content)
        except OSError as error:
            raise CheckpointError(f"the tokenizer cannot be written to {folder}: {error}") from error

    def _side_files(self) -> dict[str, bytes]:
        added = {token: self.encoder[token.content] for token in self.added_tokens}
        return side_files(added, self.bos_token, self.eos_token, self.add_bos_token, self.add_prefix_space)

    def check_place(self, directory: str | os.PathLike[str]) -> None:
        """Raise `CheckpointError` if a `tokenizer.json` of another tokenizer would be read in place of this one."""
        path = Path(directory) / TOKENIZER_JSON
        if path.exists() and TOKENIZER_JSON not in self._files:
            try:
                there = type(self).from_directory(directory)
            except TokenizerError:
                there = None
            if there is None or there._meaning != self._meaning:
                raise CheckpointError(
                    f"{path} would be read in place of the tokenizer to be saved there, and is another: "
                    "remove it, or choose another directory"
                )

    @property
    def _meaning(self) -> tuple[Any, ...]:
        """Everything that decides which ids a text has."""
        roles = (self.bos_token, self.eos_token, self.add_bos_token, self.add_prefix_space)
        return self.encoder, self.merges, set(self.added_tokens), *roles

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, or None."""
        return None if self.bos_token is None else self.encoder[self.bos_token]

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, or None."""
        return None if self.eos_token is None else self.encoder[self.eos_token]

    @property
    def ids(self) -> KeysView[int]:
        """The ids that have a token."""
        return self.decoder.keys()

    def __len__(self) -> int:
        """Return the number of tokens; `n_vocab` is larger where the ids have gaps."""
        return len(self.encoder)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`; `<|endoftext|>` and other special tokens are plain text unless they are allowed.

        Raises `TokenizerError` for text that has no UTF-8 form (lone surrogates), or a byte without a token.
        """
        return list(itertools.chain.from_iterable(self.encode_pieces([text], special_tokens=special_tokens)))

    def encode_pieces(self, pieces: Iterable[str], *, special_tokens: bool = False) -> Iterator[list[int]]:
        """Yield the ids of one text that comes in pieces, each cut as `text_files.text_pieces` cuts.

        Together they are the ids of the whole text. Raises as `encode` does.
        """
        added = self._all_added if special_tokens else self._added_words
        if self.add_bos_token and self.bos_token is not None:
            yield [self.encoder[self.bos_token]]
        begins = True  # It is true at the beginning of the text, and after an added token.
        for piece in added.uncut(map(check_text, pieces)):
            ids: list[int] = []
            for part, is_added in added.split(piece):
                if is_added:
                    ids.append(self.encoder[part])
                else:
                    needs_space = self.add_prefix_space and begins and not part.startswith(" ")
                    ids += self._encode_ordinary(f" {part}" if needs_space else part)
                begins = is_added
            yield ids

    def first_special(self, text: str) -> str | None:
        """Return the first special token that `text` spells, or None."""
        return next((part for part, is_added in self._special.split(text) if is_added), None)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of `ids`; `errors` says how incomplete characters are decoded, as in `bytes.decode`.

        Raises `TokenizerError` for ids without a token, and with `errors="strict"` for incomplete characters.
        """
        try:
            return self.decode_bytes(ids).decode("utf-8", errors)
        except (UnicodeDecodeError, LookupError) as error:
            raise TokenizerError(f"the ids are no text with errors={errors!r}: {error}") from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`, perhaps with incomplete characters. Raises as `token_bytes` does."""
        try:
            each = iter(ids)
        except TypeError:
            raise TokenizerError(f"expected a sequence of token ids, not {ids!r}") from None
        return b"".join(map(self.token_bytes, each))

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token. Raises `TokenizerError` if `id` has no token or is not an integer."""
        try:
            token = self.decoder[_checked_id(id)]
        except KeyError:
            gaps = "" if len(self) == self.n_vocab else ", with gaps"
            raise TokenizerError(f"token id {id} has no token: ids are 0 to {self.n_vocab - 1}{gaps}") from None
        # An added token stands for its own characters, unless ordinary text can become it too.
        if token in self._literal or not BYTE_OF_CHARACTER.keys() >= set(token):
            return token.encode()
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, token))

    def _is_ordinary(self, token: str) -> bool:
        """Return whether ordinary text can become this token: it is a byte, or a merge makes it."""
        splits = ((token[:place], token[place:]) for place in range(1, len(token)))
        return token in BYTE_OF_CHARACTER or any(split in self._rank for split in splits)

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in WORD.finditer(text):
            word = match.group()
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        characters = [CHARACTER_OF_BYTE[byte] for byte in word.encode()]
        if missing := next((character for character in characters if character not in self.encoder), None):
            byte = BYTE_OF_CHARACTER[missing]
            raise TokenizerError(
                f"the text has the byte {byte:#04x} in {word!r:.60}, and this vocabulary has no token for it "
                f"({missing!r} in its file): leave it out, or take a model whose vocabulary has all 256 bytes"
            )
        ids = [self.encoder[token] for token in merge_word(characters, self._rank)]
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()  # This is simple, and common words are soon back.
            self._cache[word] = ids
        return ids


def _checked_id(id: Any) -> int:
    """Return `id` as a Python int. NumPy's integers are accepted, truth values are not."""
    try:
        if not isinstance(id, bool) and str(getattr(id, "dtype", "")) != "bool":
            return operator.index(id)
    except TypeError:
        pass
    raise TokenizerError(f"{id!r} is no token id: expected an integer, not {type(id).__name__}")


def _check_parts(
    encoder: dict[str, int],
    merges: list[tuple[str, str]],
    added: Iterable[str],
    roles: Iterable[str | None],
    source_names: SourceNames,
) -> None:
    """Raise `TokenizerError` where vocabulary, merges, added tokens and those with a role do not fit each other."""
    if not encoder:
        raise TokenizerError(f"{source_names.vocabulary} has no tokens")
    for token, id in encoder.items():
        if type(id) is not int or id < 0:
            raise TokenizerError(f"{source_names.vocabulary}: the id of {token!r} is {id!r}, expected an integer >= 0")
    if len(set(encoder.values())) < len(encoder):
        first, second = _same_id(encoder)
        raise TokenizerError(f"{source_names.vocabulary}: {first!r} and {second!r} have the same id {encoder[first]}")
    try:
        "".join(encoder).encode()  # Checking all at once is faster, because there are 50 000.
    except UnicodeEncodeError as error:
        token = next(token for token in encoder if error.object[error.start] in token)
        raise TokenizerError(f"{source_names.vocabulary}: {token!r} has a lone surrogate, so it is not text") from None
    if encoder.keys().isdisjoint(CHARACTER_OF_BYTE):  # Small vocabularies may lack rare bytes.
        raise TokenizerError(f"{source_names.vocabulary}: not byte-level BPE: it has no token for a byte")
    # All merges are checked at once. They are checked one by one only to find the wrong one.
    known = encoder.__contains__
    fit = all(map(known, itertools.chain.from_iterable(merges))) and all(map(known, map("".join, merges)))
    for rank, (left, right) in enumerate(() if fit and EOS not in map("".join, merges) else merges):
        for token in (left, right, left + right):
            if token not in encoder:
                raise TokenizerError(f"{source_names.merge(rank)}: {left!r} + {right!r}: {token!r} has no id")
        if left + right == EOS:
            raise TokenizerError(f"{source_names.merge(rank)}: makes {EOS}, which text must not become by itself")
    for token in (*added, *(role for role in roles if role is not None)):
        if not token or token not in encoder:
            raise TokenizerError(f"{source_names.vocabulary}: the added token {token!r} is empty or has no id")


def _same_id(encoder: dict[str, int]) -> tuple[str, str]:
    """Return the first two tokens with the same id."""
    first: dict[int, str] = {}
    return next((first[id], token) for token, id in encoder.items() if first.setdefault(id, token) != token)
