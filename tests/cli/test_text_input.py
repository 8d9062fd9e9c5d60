"""Text from stdin and from files: every command reads the same bytes in the same way."""

import codecs
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result, posix

from gpt_xp import Tokenizer
from gpt_xp.cli import run
from gpt_xp.training import corpus

pytestmark = pytest.mark.usefixtures("no_variables")
Call = Callable[..., Result]
TEXT = "Être ou ne pas être, my lord"
READERS = {  # IN is "-", or a file
    "generate": ("-n", "3", "-"),
    "generate without a word": ("-n", "3"),
    "prompt file": ("--prompt-file", "IN", "-n", "3", "--json-full"),
    "tokens": ("tokens", "-"),
    "score": ("score", "IN", "--json"),
    "choices": ("score", "--choices", "-", " a", " b"),
    "tokenizer train": ("tokenizer", "train", "--vocab-size", "259", "--out", "OUT", "IN"),
}
reads_stdin = pytest.mark.parametrize("reader", READERS)
reads_a_file = pytest.mark.parametrize("reader", [name for name, args in READERS.items() if "IN" in args])


def arguments(reader: str, tmp_path: Path, file: str = "-") -> list[str]:
    return [{"IN": file, "OUT": str(tmp_path / "out")}.get(word, word) for word in READERS[reader]]


def said(result: Result, tmp_path: Path) -> tuple[int, list[str], str, list[bytes]]:
    """The outcome, without times, and what was written."""
    words = [word for word in result.out.split() if not any(digit in word for digit in "0123456789")]
    written = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*"))]
    return result.code, words, result.err, written


@reads_stdin
def test_a_byte_order_mark_on_stdin_is_no_text(call: Call, tmp_path: Path, reader: str) -> None:
    args = arguments(reader, tmp_path)
    plain = said(call(*args, stdin=TEXT.encode()), tmp_path)
    assert plain[0] == 0
    args += ["--force"] if reader == "tokenizer train" else []
    assert said(call(*args, stdin=codecs.BOM_UTF8 + TEXT.encode()), tmp_path) == plain


@reads_a_file
def test_a_byte_order_mark_in_a_file_is_no_text(call: Call, tmp_path: Path, reader: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    plain = said(call(*arguments(reader, tmp_path, str(file))), tmp_path)
    assert plain[0] == 0
    file.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    force = ["--force"] if reader == "tokenizer train" else []
    assert said(call(*arguments(reader, tmp_path, str(file)), *force), tmp_path) == plain


def test_a_byte_order_mark_is_not_trained_on(tmp_path: Path, shakespeare) -> None:
    found = []
    for name, mark in (("plain", b""), ("marked", codecs.BOM_UTF8)):
        files = [tmp_path / f"{name}-{number}.txt" for number in range(2)]
        for file in files:
            file.write_bytes(mark + TEXT.encode())
        settings = corpus.TrainingSettings(data=tuple(map(str, files)), val_fraction=0.3)
        folder = tmp_path / name
        folder.mkdir()
        corpus.tokenize(corpus.split(settings), shakespeare.tokenizer, folder, n_vocab=shakespeare.config.n_vocab)
        found.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert found[0] == found[1]


@reads_stdin
def test_stdin_that_is_not_utf8_is_one_error_with_its_place(call: Call, tmp_path: Path, reader: str) -> None:
    result = call(*arguments(reader, tmp_path), stdin=codecs.BOM_UTF8 + b"ab\xff")
    assert result.code == 1
    if reader == "prompt file":  # an error in the place of the line, which begins after the mark
        assert '"error": "the line is not UTF-8 text: invalid start byte at byte 2"' in result.out
    else:
        assert result.err == (
            "gpt-xp: error: stdin is not UTF-8 text: invalid start byte at byte 5; convert it first\n"
        )


@reads_stdin
def test_utf16_from_a_shell_of_windows_is_called_by_its_name(call: Call, tmp_path: Path, reader: str) -> None:
    result = call(*arguments(reader, tmp_path), stdin="My lord\n".encode("utf-16"))
    assert result == (1, "", "gpt-xp: error: stdin is UTF-16, expected UTF-8: convert it first\n")


@reads_stdin
def test_stdin_that_is_closed_is_one_error(call: Call, tmp_path: Path, reader: str) -> None:
    result = call(*arguments(reader, tmp_path), stdin=None)
    message = "stdin is closed: expected text"
    assert result == (1, "", f"gpt-xp: error: {message}\n")


@reads_stdin
def test_stdin_that_is_empty_is_one_error(call: Call, tmp_path: Path, reader: str) -> None:
    for stdin in (b"", codecs.BOM_UTF8):
        result = call(*arguments(reader, tmp_path), stdin=stdin)
        assert result.code in (1, 2)
        assert result.out == ""
        assert any(part in result.err for part in ("stdin is empty", "stdin holds no prompt", "the text is empty"))


@pytest.mark.parametrize("args", [["--prompt-file", "-", "--prompt-file", "-"], ["tokenizer", "train", "-", "-"]])
def test_stdin_is_read_once(call: Call, tmp_path: Path, args: list[str]) -> None:
    train = ["--vocab-size", "280", "--out", str(tmp_path)] if "train" in args else []
    result = call(*args, *train, stdin=b"My lord")
    assert result.code == 2
    assert "stdin (-) can be read only once" in result.err


# Text on stdin that nobody reads


@posix
@pytest.mark.parametrize(
    ("args", "is_read"),
    [
        (["tokens", "a"], False),
        (["-n", "1", "a"], False),
        (["--prompt-file", "FILE", "-n", "1"], False),
        (["score", "FILE"], False),
        (["score", "--choices", "a", "b"], False),
        (["score", "--choices", "--", "-", "b"], False),
        (["tokens", "-", "a"], True),
        (["tokens"], True),
        (["--prompt-file", "-", "-n", "1"], True),
        (["--prompt-file", "FILE", "--prompt-file", "-", "-n", "1"], True),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "file", "an empty pipe", "/dev/null"])
def test_stdin_that_is_not_read_is_told(monkeypatch, capsys, tmp_path: Path, args, is_read, kind) -> None:
    file, piped = tmp_path / "text.txt", tmp_path / "piped.txt"
    file.write_text("my lord")
    piped.write_text("speak")
    if "pipe" in kind:
        reading, writing = os.pipe()
        os.write(writing, b"speak" if kind == "pipe" else b"")
        os.close(writing)
    else:
        reading = os.open(piped if kind == "file" else kind, os.O_RDONLY)
    with open(reading) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "argv", ["gpt-xp", *(str(file) if word == "FILE" else word for word in args)])
        code = run()
    told = capsys.readouterr().err
    if kind in ("pipe", "file"):
        assert code == 0
        assert told == ("" if is_read else 'gpt-xp: stdin is not read: put "-" where its text belongs\n')
    else:
        assert "not read" not in told


# Counting


def test_tokens_are_counted(call: Call, shakespeare) -> None:
    n_tokens = len(shakespeare.tokenizer.encode(TEXT))
    assert call("tokens", "--count", TEXT) == (0, f"{n_tokens}\n", "")
    assert call("tokens", "--count", stdin=f"{TEXT}\n".encode()).out == f"{n_tokens}\n"
    assert call("tokens", "--count", "").out == "0\n"
    assert call("tokens", "--count", "--json", TEXT).out == (
        f'{{"schema": 2, "model": "shakespeare", "count": {n_tokens}}}\n'
    )


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_long_text_takes_little_memory(call: Call, monkeypatch, shakespeare, more: list[str]) -> None:
    text = "To be, or not to be: that is the question.\n" * 6000
    ids = shakespeare.tokenizer.encode(text)
    written: list[str] = []
    monkeypatch.setattr(Tokenizer, "from_directory", lambda directory: shakespeare.tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("gpt_xp.cli.output.write", lambda text: written.append(text[:200]))
        tracemalloc.start()
        try:
            assert call("tokens", *more, stdin=text.encode()).code == 0
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 10 * len(ids) + 6 * len(text)  # a record or a row of each token takes ten times that
    out = call("tokens", *more, stdin=text.encode()).out
    shown = [token["id"] for token in json.loads(out)["tokens"]] if more else rows(out)
    assert shown == ids[:-1]  # the last newline is no part of the text


def rows(out: str) -> list[int]:
    return [int(line.split()[0]) for line in out.split("\n")[1:-1]]
