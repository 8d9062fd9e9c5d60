"""Read files of text as a stream of pieces, so that a corpus larger than memory can be counted or tokenized.

A source is a path or a stream of bytes. Its text is UTF-8. A byte order mark at its beginning, which editors on Windows
write, is no part of the text. All parts of gpt-xp get stdin from `stdin`.

A piece ends where whitespace follows another character. No word of `words.WORD` crosses such a place, because
whitespace is only at a word's beginning. A run of whitespace may leave its last character to the next word. The
character after the run decides this, and it is in the same piece. So the words of all pieces are the words of the text.
"""

import codecs
import contextlib
import os
import stat
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import regex

from gpt_xp.errors import TextError

PIECE_BYTES = 1_000_000
Source = str | os.PathLike[str] | BinaryIO

_LAST_CUT = regex.compile(r"(?r)\S(?=\s)")  # (?r) searches from the end. \s is as in `WORD`.


def text_pieces(
    sources: Iterable[Source], *, n_bytes: int = PIECE_BYTES, advance: Callable[[int], object] | None = None
) -> Iterator[str]:
    """Return the texts of `sources` in pieces of about `n_bytes`. Encoding each piece gives the ids of the whole text.

    A stream is left open. Each source is a separate text: no word reaches from one into the next. To put something
    between texts, call this for each of them. Line ends are not translated. A piece is longer where nothing shorter
    can be cut off. Special tokens stay whole if they have no whitespace. `advance` is called with a number of bytes
    when the pieces that they completed have been taken.

    Raises `TextError`, at once and for all paths, where a file is missing, a directory, empty or unreadable; and later
    for bytes that are not UTF-8.
    """
    each = _listed(sources)
    size_of(each)
    return (piece for source in each for piece in _pieces(source, n_bytes, advance or (lambda n: None)))


def read_text(source: Source) -> str:
    """Return the whole text of a source, "" if it is empty. Raises `TextError` for a bad file, or not UTF-8."""
    return "".join(_decoded(source, PIECE_BYTES, lambda n: None))


def read_bytes(source: Source) -> bytes:
    """Return the bytes of the text of a source. Raises `TextError` where it cannot be read."""
    return b"".join(data for _, data in _read(source, PIECE_BYTES))


def stdin() -> BinaryIO:
    """Return stdin as a source. Raises `TextError` where it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise TextError("stdin is closed: expected text")
    return sys.stdin.buffer


def size_of(sources: Iterable[Source]) -> int | None:
    """Return the number of bytes of all `sources`, or None if one is a stream. Raises as `text_pieces` does."""
    sizes = [_size(source) for source in _listed(sources)]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _listed(sources: Iterable[Source]) -> list[Source]:
    if isinstance(sources, (str, os.PathLike)):
        raise TextError(f"expected a list of files, not one file: [{os.fspath(sources)!r}]")
    return list(sources)


def _size(source: Source) -> int | None:
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        status = os.stat(source)
        if stat.S_ISREG(status.st_mode):
            open(source, "rb").close()  # This raises an error for an unreadable file.
    except (OSError, ValueError) as error:  # A null character in the name is a ValueError.
        raise TextError(f"{source} cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(status.st_mode):
        raise TextError(f"{source} is a directory: expected a text file; name the files in it")
    if not stat.S_ISREG(status.st_mode):
        return None  # A pipe has no size.
    if not status.st_size:
        raise TextError(f"{source} is empty: expected text")
    return status.st_size


def _pieces(source: Source, n_bytes: int, advance: Callable[[int], object]) -> Iterator[str]:
    is_empty = True
    for piece in _cut(_decoded(source, n_bytes, advance)):
        is_empty = False
        yield piece
    if is_empty:
        raise TextError(f"{_name(source)} is empty: expected text")


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in pieces that end between two words."""
    rest: list[str] = []
    for text in texts:
        end = cut.end() if (cut := _LAST_CUT.search(text)) else 0
        if end:
            yield "".join([*rest, text[:end]])
            rest.clear()
        rest.append(text[end:])
    if last := "".join(rest):
        yield last


def _decoded(source: Source, n_bytes: int, advance: Callable[[int], object]) -> Iterator[str]:
    """Yield the text of a source in pieces that end anywhere between two characters."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    end = 0
    try:
        for begin, data in _read(source, n_bytes):
            before, end = end, begin + len(data)
            yield decode(data)
            advance(end - before)
        yield decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = end - len(error.object) + error.start  # The decoder may hold half a character.
        raise TextError(
            f"{_name(source)} is not UTF-8 text: {error.reason} at byte {place}; convert it first"
        ) from None


def _read(source: Source, n_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a source, without a byte order mark, and each time their place in the source."""
    place = 0
    try:
        with _opened(source) as stream:
            while data := stream.read(n_bytes if place else max(n_bytes, len(BOM_UTF8))):
                text = data if place else data.removeprefix(BOM_UTF8)
                if not place and text.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                    raise TextError(f"{_name(source)} is UTF-16, expected UTF-8: convert it first")
                yield place + len(data) - len(text), text
                place += len(data)
    except OSError as error:
        raise TextError(f"{_name(source)} cannot be read: {_reason(error)}") from error


def _opened(source: Source) -> contextlib.AbstractContextManager[BinaryIO]:
    return open(source, "rb") if isinstance(source, (str, os.PathLike)) else contextlib.nullcontext(source)


def _name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    is_stdin = sys.stdin is not None and source is sys.stdin.buffer
    return "stdin" if is_stdin else str(getattr(source, "name", source))


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
