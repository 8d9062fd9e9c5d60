"""Turn text into token ids on disk, in a stream, and make batches of them.

The ids are in two files, `train.bin` and `val.bin`, as uint16 (uint32 for a vocabulary above 65,536). The files are
mapped, so neither the text nor its ids must fit into memory. The last `val_fraction` of the characters of all files
together is the validation text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp.atomic_files import sync, write_json, written_aside
from gpt_xp.checked_files import mapping_errors, read_json
from gpt_xp.errors import CheckpointError, TextError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.text_files import size_of, text_pieces
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.types import NumpyArray

TRAIN, VAL, COUNTS = "train.bin", "val.bin", "corpus.json"
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Span:
    """The characters `first` up to `last` (None: the end) of several files, one after the other."""

    files: tuple[str, ...]
    first: int = 0
    last: int | None = None

    def pieces(self, advance: Advance | None = None) -> Iterator[str | None]:
        """Yield the text in pieces that end between two words, and None between two files."""
        place = 0
        for index, file in enumerate(self.files):
            if index and self.first < place and (self.last is None or place < self.last):
                yield None
            for piece in text_pieces([file], advance=advance):
                last = len(piece) if self.last is None else max(self.last - place, 0)
                if part := piece[max(self.first - place, 0) : last]:
                    yield part
                place += len(piece)
                if self.last is not None and place >= self.last:
                    return


@dataclass(frozen=True)
class Counts:
    """The size of the training and the validation text, as `corpus.json` has it."""

    train_tokens: int
    train_characters: int
    val_tokens: int
    val_characters: int


@dataclass(frozen=True)
class Corpus:
    """The token ids, mapped from their files, and the size of the text."""

    train: NumpyArray
    val: NumpyArray
    counts: Counts

    @property
    def tokens_per_character(self) -> float:
        """Tokens per character of the validation text, which turn nats per token into nats per character."""
        return self.counts.val_tokens / self.counts.val_characters


def split(settings: TrainingSettings, advance: Advance | None = None) -> tuple[Span, Span]:
    """Return the text to train on and the text to validate on. Raises `TextError` as `text_pieces` does."""
    if settings.val:
        return Span(settings.data), Span(settings.val)
    n_characters = sum(len(piece) for piece in Span(settings.data).pieces(advance) if piece is not None)
    # The number is rounded down to whole characters, as other programs with this split do.
    first = int(n_characters * (1 - settings.val_fraction))
    return Span(settings.data, 0, first), Span(settings.data, first)


def text_of(span: Span, advance: Advance | None = None) -> Iterator[str]:
    """Yield the text of a span without the marks between files, to train a tokenizer."""
    return (piece for piece in span.pieces(advance) if piece is not None)


def n_bytes(settings: TrainingSettings) -> int:
    """Return the bytes of all files. Raises `TextError` for a file that cannot be read, or not more than once."""
    n = 0
    for file in (*settings.data, *settings.val):
        if (size := size_of([file])) is None:
            raise TextError(f"{file} is a pipe, and the text is read more than once: write it to a file first")
        n += size
    return n


def tokenize(
    spans: tuple[Span, Span],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    n_vocab: int,
    special_tokens: bool = False,
    advance: Advance | None = None,
) -> str | None:
    """Write the token ids of both spans, and then the counts, which mark that everything is written.

    The tokenizer's end token, if it has one, is put between two files. With `special_tokens`, text that spells a
    special token is read as that token. Without, the first special token that the text spells is returned. Raises
    `TextError` for text that cannot be read, and for an id outside the model's table of `n_vocab` rows;
    `CheckpointError` where a file cannot be written.
    """
    written = [
        _SpanWriter(span, tokenizer, n_vocab, special_tokens, advance).write(folder / name)
        for span, name in zip(spans, (TRAIN, VAL), strict=True)
    ]
    train, val = written
    counts = Counts(train.n_tokens, train.n_characters, val.n_tokens, val.n_characters)
    with written_aside(folder / COUNTS, 100) as aside:
        write_json(aside, asdict(counts))
    return train.spelled or val.spelled


def is_tokenized(folder: Path) -> bool:
    """Return whether `tokenize` has written everything to `folder`."""
    return (folder / COUNTS).exists()


def open_corpus(folder: Path, tokenizer: Tokenizer, length: int) -> Corpus:
    """Map the files that `tokenize` has written.

    Raises `TextError` where the text is too short for rows of `length` tokens; `CheckpointError` where a file is
    damaged or cannot be mapped.
    """
    try:
        counts = Counts(**read_json(str(folder / COUNTS)))
    except TypeError as error:
        raise CheckpointError(f"{folder / COUNTS} is damaged ({error}): train in another directory") from None
    if counts.train_tokens <= length:
        raise TextError(
            f"the text to train on has {counts.train_tokens} tokens, and each row of a batch takes {length} and one "
            "more: give more text, or a smaller seq_len"
        )
    if counts.val_tokens < 2:
        raise TextError(
            f"the text to validate on has {counts.val_tokens} tokens, and one must predict another: give more text, "
            "or a larger val_fraction"
        )
    dtype = _dtype(tokenizer)
    train, val = _map(folder / TRAIN, dtype, counts.train_tokens), _map(folder / VAL, dtype, counts.val_tokens)
    return Corpus(train, val, counts)


def _map(path: Path, dtype: Any, n_tokens: int) -> NumpyArray:
    """Map a file of token ids. Raises `CheckpointError` if it has not `n_tokens`, or cannot be mapped."""
    size = path.stat().st_size if path.exists() else 0
    if size != n_tokens * np.dtype(dtype).itemsize:
        raise CheckpointError(
            f"{path} is damaged: it has {size} bytes, and {n_tokens} tokens were written: train in another directory"
        )
    with mapping_errors(path):
        return np.memmap(path, dtype, "r")


def crops(tokens: NumpyArray, length: int, n: int, seed: int, step: int) -> NumpyArray:
    """Return `n` random crops of the text, int32 [n, length + 1]; each token except the first is predicted.

    They depend on seed and step alone, so that a resumed run gets the same batches.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - length, size=n)
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)


def validation_rows(tokens: NumpyArray, length: int, most: int) -> NumpyArray:
    """Return the text cut into rows, int32 [n, length + 1].

    Each row begins with the last token of the row before, so that every token is predicted once. The rest at the end,
    shorter than a row, is left out. Of a text with more than `most` tokens, rows at even distances are taken. A text
    shorter than a row becomes one shorter row.
    """
    length = min(length, len(tokens) - 1)
    n = (len(tokens) - 1) // length
    chosen = np.unique(np.linspace(0, n - 1, max(min(n, most // length), 1)).astype(int))
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in chosen]).astype(np.int32)


@dataclass
class _SpanWriter:
    """Writes the token ids of one span, and counts tokens and characters."""

    span: Span
    tokenizer: Tokenizer
    n_vocab: int
    special_tokens: bool
    advance: Advance | None
    n_tokens: int = 0
    n_characters: int = 0
    spelled: str | None = None  # the first special token that the text spells and that is read as plain text

    def write(self, path: Path) -> "_SpanWriter":
        with written_aside(path, 0) as aside:
            with open(aside, "wb") as file:
                for ids in self._ids():
                    self._check(ids)
                    file.write(np.asarray(ids, _dtype(self.tokenizer)).tobytes())
                    self.n_tokens += len(ids)
            sync(aside)
        return self

    def _ids(self) -> Iterator[Sequence[int]]:
        pieces = self.span.pieces(self.advance)
        for is_text, group in groupby(pieces, key=lambda piece: piece is not None):
            if is_text:
                yield from self.tokenizer.encode_pieces(self._seen(group), special_tokens=self.special_tokens)
            else:
                yield from ([_between(self.tokenizer)] * len(list(group)))

    def _seen(self, pieces: Iterable[str | None]) -> Iterator[str]:
        for piece in pieces:
            assert piece is not None
            self.n_characters += len(piece)
            if not self.special_tokens and self.spelled is None:
                self.spelled = self.tokenizer.first_special(piece)
            yield piece

    def _check(self, ids: Sequence[int]) -> None:
        if (largest := max(ids, default=0)) >= self.n_vocab:  # JAX would silently clamp the id.
            raise TextError(
                f"the text has {self.tokenizer.decoder[largest]!r}, token {largest}, and the table of this model ends "
                f"at {self.n_vocab - 1}: take it out, or start from a model with a larger table"
            )


def _between(tokenizer: Tokenizer) -> Sequence[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _dtype(tokenizer: Tokenizer) -> Any:
    return np.dtype("<u2") if tokenizer.n_vocab <= 2**16 else np.dtype("<u4")
