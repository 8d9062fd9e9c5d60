"""GPT-2's byte-level BPE: text -> token ids -> text.

Text is cut into words by a pattern. The UTF-8 bytes of a word are its first tokens; then neighbours are merged,
the earliest learned merge first, until no two neighbours are a merge. Every byte is a token, so all text has
tokens. In the files a byte is written as a printable character: the space as 'Ġ', so ' all' as 'Ġall'.

Sources: Radford et al. 2019, section 2.2; Sennrich et al. 2016 for BPE; the pattern and the characters that
stand for bytes are those of `encoder.py` in openai/gpt-2.
"""

import heapq
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import regex

from gpt_xp.errors import CheckpointError, TokenizerError

EOS = "<|endoftext|>"

# A word is a contraction, or letters, digits or other marks with the space before them, or whitespace, which
# leaves its last character to the word that follows: "a   b" is "a", "  ", " b".
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

CACHED_WORDS = 50_000
LONGEST_CACHED_WORD = 50  # longer ones seldom come twice, and would let the cache grow without bound

TOKENIZER_JSON, ADDED_TOKENS, VOCAB, MERGES = "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"
PAIRS = ((VOCAB, MERGES), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, OpenAI's names

# What a tokenizer.json must say to be GPT-2's; None stands for null and for a field that is not there.
GPT2_FIELDS: dict[str, tuple[Any, ...]] = {
    "model.type": ("BPE", None),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": ("", None),
    "model.end_of_word_suffix": ("", None),
    "model.byte_fallback": (False, None),
    "model.ignore_merges": (False, None),
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": ("ByteLevel", "TemplateProcessing", None),
    "post_processor.special_tokens": ({}, None),  # a template that has some adds them to each text
    "decoder.type": ("ByteLevel", None),
}


def _byte_characters() -> list[str]:
    """The character that stands for each byte: its own in Latin-1 if that is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}  # 0xAD is the soft hyphen
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


class _Places(NamedTuple):
    """How error messages name the vocabulary, and merge number i."""

    vocabulary: str
    merge: Callable[[int], str]


_IN_MEMORY = _Places("encoder", "merges[{}]".format)


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
        _places: _Places = _IN_MEMORY,
    ) -> None:
        """Raises `TokenizerError` if vocabulary, merges and special tokens do not fit each other."""
        self.encoder = dict(encoder)
        self.merges = list(merges)
        self.special_tokens = frozenset(special_tokens) | ({EOS} & self.encoder.keys())
        _check_parts(self.encoder, self.merges, self.special_tokens, _places)
        self.decoder = {id: token for token, id in self.encoder.items()}
        self.ids = frozenset(self.decoder)
        self.n_vocab = max(self.ids) + 1
        self.eos_token_id = self.encoder.get(EOS)
        self._bytes = _all_token_bytes(self.encoder, self.merges, self.special_tokens)
        self._byte_ids = [self.encoder[character] for character in CHARACTER_OF_BYTE]
        self._ranked = {  # the ids of a pair -> its rank, the id of the two as one
            (self.encoder[left], self.encoder[right]): (rank, self.encoder[left + right])
            for rank, (left, right) in enumerate(self.merges)
        }
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
            return cls(*_read_tokenizer_json(folder / TOKENIZER_JSON))
        for vocab, merges in PAIRS:
            if (folder / vocab).exists() and (folder / merges).exists():
                return cls(*_read_pair(folder / vocab, folder / merges))
        raise TokenizerError(_what_is_missing(folder))

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
            _write_all(folder, files)
        except OSError as error:
            raise CheckpointError(f"the tokenizer cannot be written to {folder}: {error}") from error

    def check_place(self, directory: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` if a `tokenizer.json` of another tokenizer would be read in place of this one."""
        path = Path(directory) / TOKENIZER_JSON
        if path.exists():
            try:
                there = type(self)(*_read_tokenizer_json(path))
            except TokenizerError:
                there = None
            if there is None or (there.encoder, there.merges) != (self.encoder, self.merges):
                raise CheckpointError(
                    f"{path} would be read in place of the tokenizer to be saved there, and is another: "
                    "remove it, or choose another directory"
                )

    def __len__(self) -> int:
        """How many tokens there are; `n_vocab` is larger where the ids have gaps."""
        return len(self.encoder)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; `<|endoftext|>` and the like are plain text unless `allow_special`.

        Raises `TokenizerError` for text that has no UTF-8 form (lone surrogates).
        """
        _check_text(text)
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
            return self._bytes[_integer(id)]
        except KeyError:
            gaps = "" if len(self) == self.n_vocab else ", with gaps"
            raise TokenizerError(f"token id {id} has no token: ids are 0 to {self.n_vocab - 1}{gaps}") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in WORD.finditer(text):
            word = match.group()
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = self._merged([self._byte_ids[byte] for byte in word.encode()])
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()  # simpler than forgetting the oldest, and common words are soon back
            self._cache[word] = ids
        return ids

    def _merged(self, ids: list[int]) -> list[int]:
        """`ids` after all merges: each time the one of lowest rank, and of several such the leftmost.

        O(n log n): a heap holds the merges that are possible, two linked lists the neighbours. The lists are rings
        closed by a place without a token, so that the first and the last token too have two neighbours.
        """
        nothing = -1
        ids = [*ids, nothing]
        size = len(ids)
        before, after = [size - 1, *range(size - 1)], [*range(1, size), 0]
        possible: list[tuple[int, int, int]] = []

        def propose(left: int) -> None:
            if merge := self._ranked.get((ids[left], ids[after[left]])):
                heapq.heappush(possible, (merge[0], left, merge[1]))

        for place in range(size):
            propose(place)
        while possible:
            rank, left, merged = heapq.heappop(possible)
            right = after[left]
            if self._ranked.get((ids[left], ids[right])) != (rank, merged):
                continue  # another merge has taken one of the two since
            ids[left], ids[right] = merged, nothing
            after[left] = after[right]
            before[after[left]] = left
            propose(before[left])
            propose(left)
        return [id for id in ids if id != nothing]


def _all_token_bytes(
    encoder: dict[str, int], merges: list[tuple[str, str]], special_tokens: frozenset[str]
) -> dict[int, bytes]:
    """id -> bytes; a special token stands for its own characters, unless ordinary text can become it too."""
    literal = special_tokens - {*CHARACTER_OF_BYTE, *(left + right for left, right in merges)}
    return {
        id: token.encode()
        if token in literal or not BYTE_OF_CHARACTER.keys() >= set(token)
        else bytes(map(BYTE_OF_CHARACTER.__getitem__, token))
        for token, id in encoder.items()
    }


def _integer(id: Any) -> int:
    """`id` as a Python int; NumPy's integers are integers too, truth values are not."""
    try:
        if not isinstance(id, bool) and str(getattr(id, "dtype", "")) != "bool":
            return operator.index(id)
    except TypeError:
        pass
    raise TokenizerError(f"{id!r} is no token id: expected an integer, not {type(id).__name__}")


def _check_text(text: str) -> None:
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
    encoder: dict[str, int], merges: list[tuple[str, str]], special_tokens: frozenset[str], places: _Places
) -> None:
    """Raises `TokenizerError` where vocabulary, merges and special tokens do not fit each other."""
    first: dict[int, str] = {}
    for token, id in encoder.items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise TokenizerError(f"{places.vocabulary}: the id of {token!r} is {id!r}, expected an integer >= 0")
        if first.setdefault(id, token) != token:
            raise TokenizerError(f"{places.vocabulary}: {first[id]!r} and {token!r} have the same id {id}")
        if token.encode(errors="ignore").decode() != token:
            raise TokenizerError(f"{places.vocabulary}: {token!r} has a lone surrogate, so it is not text")
    for byte, character in enumerate(CHARACTER_OF_BYTE):
        if character not in encoder:
            raise TokenizerError(f"{places.vocabulary}: not byte-level BPE: no {character!r} for byte {byte:#04x}")
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in encoder:
                raise TokenizerError(f"{places.merge(rank)}: {left!r} + {right!r}: {token!r} has no id")
        if left + right == EOS:
            raise TokenizerError(f"{places.merge(rank)}: makes {EOS}, which text must not become by itself")
    for token in special_tokens:
        if not token or token not in encoder:
            raise TokenizerError(f"{places.vocabulary}: special token {token!r} is empty or has no id")


# Files. Each of the two readers returns the arguments of `Tokenizer`.

_Parts = tuple[dict[str, int], list[tuple[str, str]], Iterable[str], _Places]


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a directory: expected one with the files of a tokenizer"
    for pair in PAIRS:
        for here, missing in (pair, pair[::-1]):
            if (folder / here).exists():
                return f"{folder} has {here} but not {missing}: the two belong together"
    pairs = " or ".join(" + ".join(pair) for pair in PAIRS)
    return f"{folder} has no tokenizer: looked for {TOKENIZER_JSON} or {pairs}"


def _read_pair(vocab: Path, merges: Path) -> _Parts:
    encoder, added = _read_object(vocab), {}
    if vocab.name == VOCAB and (extra := vocab.with_name(ADDED_TOKENS)).exists():
        added = _read_object(extra)
        encoder = _with_added(encoder, added, str(extra))
    # Not splitlines, which also cuts at U+0085 and others. Windows may have put \r before \n: in a token, that
    # byte is written 'č'.
    lines = [line.removesuffix("\r") for line in _read_text(merges).rstrip("\r\n").split("\n")]
    first = int(lines[0].startswith("#version"))  # further down it is a merge
    places = _Places(str(vocab), lambda rank: f"{merges}, line {first + rank + 1}")
    return encoder, [_pair(line, places.merge(rank)) for rank, line in enumerate(lines[first:])], added, places


def _read_tokenizer_json(path: Path) -> _Parts:
    document = _read_object(path)
    for field, expected in GPT2_FIELDS.items():
        if (value := _field(document, field)) not in expected:
            raise TokenizerError(
                f"{path}: not GPT-2's byte-level BPE: {field} is {json.dumps(value)}, expected "
                f"{json.dumps(expected[0])}"
            )
    for field, kind in (("model.vocab", dict), ("model.merges", list), ("added_tokens", list)):
        if not isinstance(_field(document, field), kind):
            raise TokenizerError(f"{path}: {field} is not a {kind.__name__}")
    added = dict(_added_token(entry, f"{path}: added_tokens[{i}]") for i, entry in enumerate(document["added_tokens"]))
    encoder = _with_added(document["model"]["vocab"], added, f"{path}: added_tokens")
    places = _Places(f"{path}: model.vocab", lambda rank: f"{path}: model.merges[{rank}]")
    merges = [_pair(merge, places.merge(rank)) for rank, merge in enumerate(document["model"]["merges"])]
    return encoder, merges, added, places


def _field(document: Any, field: str) -> Any:
    for name in field.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _added_token(entry: Any, place: str) -> tuple[str, int]:
    for option in ("single_word", "lstrip", "rstrip"):  # they change which characters around a token it takes
        if _field(entry, option):
            raise TokenizerError(f"{place}.{option} is {json.dumps(entry[option])}, expected false")
    match entry:
        case {"content": str(content), "id": int(id)}:
            return content, id
    raise TokenizerError(f"{place} has no content (a string) or no id (an integer)")


def _with_added(encoder: dict[str, int], added: dict[str, int], place: str) -> dict[str, int]:
    for token, id in added.items():
        if encoder.get(token, id) != id:
            raise TokenizerError(f"{place}: {token!r} is {id!r}, but {encoder[token]!r} in the vocabulary")
    return encoder | added


def _pair(merge: Any, place: str) -> tuple[str, str]:
    """The two parts of a merge, which is "left right" or ["left", "right"]."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)] if left and right:
            return left, right
    raise TokenizerError(f"{place}: {merge!r} is no merge: expected two tokens with one space between them")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TokenizerError(f"{path}, line {line}: not UTF-8: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError, and says the line
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object but a {type(value).__name__}")
    return value


def _write_all(folder: Path, files: dict[str, str]) -> None:
    """Writes `files` under temporary names, then renames all: a failure leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for path, temporary in staged.items():
            temporary.write_bytes(files[path.name].encode())
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
