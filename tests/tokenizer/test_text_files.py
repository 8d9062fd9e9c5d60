"""Text in a stream: cut only where the ids stay the same, and one clear error for what is no text."""

import codecs
import io
import os
import threading
from pathlib import Path

import pytest
from commands import posix
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_xp.errors import TextError
from gpt_xp.tokenizer.text_files import PIECE_BYTES, read_bytes, read_text, size_of, text_pieces
from gpt_xp.tokenizer.words import WORD

# What the pattern of words tells apart: letters, digits, marks, contractions, and whitespace of one to three bytes.
PARTS = [
    *" \n\r\t\x1c\x85\xa0\u2003\u3000",
    "  ",
    *"ab1!'\u200bé漢😀\ufeff",
    "'s",
    "'re",
    "'ll",
    "e\u0301",
    "<|endoftext|>",
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(
    "".join
)


def pieces(text: str, n_bytes: int) -> list[str]:
    return list(text_pieces([io.BytesIO(codecs.BOM_UTF8 + text.encode())], n_bytes=n_bytes))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 13))
@example("it 's  ours\n\n  now", 4)
@example("the end \n<|endoftext|>  \n<|endoftext|> 's", 7)
def test_the_ids_of_the_pieces_are_those_of_the_text(shakespeare, text, n_bytes):
    cut = pieces(text, n_bytes)
    assert "".join(cut) == text
    assert all(cut)
    assert [word for piece in cut for word in WORD.findall(piece)] == WORD.findall(text)
    for special in (False, True):
        ids = [id for piece in cut for id in shakespeare.encode(piece, special_tokens=special)]
        assert ids == shakespeare.encode(text, special_tokens=special)


def test_pieces_are_small():
    text = "Speak, 'tis  time\r\n" * 1000
    cut = pieces(text, 100)
    assert len(cut) >= len(text) // 100
    assert max(map(len, cut)) < 2 * 100
    assert PIECE_BYTES == 1_000_000
    assert max(map(len, pieces(text * 120, PIECE_BYTES))) < PIECE_BYTES + 10


def test_a_word_without_end_is_one_piece():
    assert pieces("a" * 1000 + " b c", 10) == ["a" * 1000 + " b", " c"]


def test_characters_come_as_they_are(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\rc\x00\x1a\xef\xbb\xbf\n")
    assert "".join(text_pieces([path])) == "a\r\nb\rc\x00\x1a\ufeff\n"


@pytest.mark.parametrize("n_bytes", [1, 2, 5, 1000])
def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path, n_bytes):
    path = tmp_path / "text"
    path.write_bytes(codecs.BOM_UTF8 + codecs.BOM_UTF8 + b"ab cd")
    told: list[int] = []
    assert "".join(text_pieces([path], n_bytes=n_bytes, advance=told.append)) == "\ufeffab cd"  # it is one mark
    assert sum(told) == path.stat().st_size
    assert read_text(path) == "\ufeffab cd"
    assert read_bytes(path) == codecs.BOM_UTF8 + b"ab cd"
    path.write_bytes(codecs.BOM_UTF8 + b"ab\xff")
    with pytest.raises(TextError, match="invalid start byte at byte 5;"):
        list(text_pieces([path], n_bytes=n_bytes))
    path.write_bytes(codecs.BOM_UTF8)
    with pytest.raises(TextError, match="text is empty"):
        list(text_pieces([path], n_bytes=n_bytes))
    assert read_text(path) == ""


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_called_by_its_name(tmp_path, encoding):
    path = tmp_path / "text"
    path.write_bytes("\ufeffmy lord".encode(encoding))
    for read in (read_text, read_bytes, lambda path: list(text_pieces([path], n_bytes=1))):
        with pytest.raises(TextError, match=f"^{path} is UTF-16, expected UTF-8: convert it first$"):
            read(path)


def test_each_source_is_a_text_of_its_own(tmp_path):
    first, second = tmp_path / "1.txt", str(tmp_path / "2.txt")
    first.write_text("over  ")
    Path(second).write_text("flow")
    stream = io.BytesIO(b" and out")
    assert list(text_pieces([first, second, stream])) == ["over", "  ", "flow", " and", " out"]
    assert not stream.closed
    assert size_of([first, second]) == 10
    assert size_of([first, second, stream]) is None
    assert list(text_pieces([])) == []


def test_every_byte_is_told_of(tmp_path):
    path = tmp_path / "text"
    path.write_text("漢字 ".join("abcdefgh"))
    told: list[int] = []
    for piece in text_pieces([path], n_bytes=10, advance=told.append):
        assert piece
    assert sum(told) == path.stat().st_size
    assert max(told) == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good \xff bad", "invalid start byte at byte 5"),
        (b"cut \xe6\xbc", "unexpected end of data at byte 4"),
        (b"0123456789\xe6\xbcx", "invalid continuation byte at byte 10"),
        ("é ".encode("latin-1"), "invalid continuation byte at byte 0"),
        (b"\xed\xa0\x80", "invalid continuation byte at byte 0"),
    ],
)
@pytest.mark.parametrize("n_bytes", [1, 3, 11, 1000])
def test_what_is_not_utf8_is_told_with_its_place(tmp_path, data, message, n_bytes):
    path = tmp_path / "text"
    path.write_bytes(data)
    with pytest.raises(TextError, match=f"^{path} is not UTF-8 text: {message}; convert it first$"):
        list(text_pieces([path], n_bytes=n_bytes))


def test_no_path_is_read_before_all_can_be(tmp_path):
    good = tmp_path / "good"
    good.write_text("good")
    empty = tmp_path / "empty"
    empty.touch()
    for bad, message in [
        (tmp_path / "missing", "missing cannot be read: No such file or directory$"),
        (str(tmp_path / "nul\0l"), "cannot be read: .*null"),
        (tmp_path, "is a directory: expected a text file; name the files in it"),
        (empty, "empty is empty: expected text"),
    ]:
        with pytest.raises(TextError, match=message):
            text_pieces([good, bad])
    with pytest.raises(TextError, match=r"a list of files, not one file: \['x.txt'\]"):
        text_pieces("x.txt")


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "text"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(TextError, match="cannot be read: Permission denied"):
        text_pieces([path])


def test_an_empty_stream_is_an_error():
    stream = io.BytesIO()
    stream.name = "<stdin>"
    with pytest.raises(TextError, match=r"^<stdin> is empty: expected text$"):
        list(text_pieces([stream]))


def test_a_disk_that_fails_is_an_error():
    class Broken(io.BytesIO):
        def read(self, n_bytes: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(TextError, match="cannot be read: Input/output error"):
        list(text_pieces([Broken()]))


@posix
def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("through a pipe"))
    writer.start()
    assert size_of([path]) is None
    assert "".join(text_pieces([path])) == "through a pipe"
    writer.join()
