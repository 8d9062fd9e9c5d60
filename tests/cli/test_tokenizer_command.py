"""`gpt-xp tokenizer train`: what it writes, what it refuses, and that it never leaves half a tokenizer."""

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import COMMAND, PATIENCE, posix, start
from folders import SHAKESPEARE

from gpt_xp import Tokenizer, train_tokenizer
from gpt_xp.tokenizer.words import EOS

pytestmark = pytest.mark.usefixtures("no_variables")
TEXT = "Six ships sail; sixty ships sink. The six ships' bells ring, and don't sink.\r\n" * 3
TRAIN = ("tokenizer", "train", "--vocab-size", "280")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "tokenizer"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_what_is_learned(call, text, out, tmp_path):
    result = call(*TRAIN, "--out", str(out), text)
    expected = train_tokenizer([TEXT], 280)
    ratio = len(TEXT) / len(expected.encode(TEXT))
    assert result == (0, "", f"gpt-xp: 280 tokens, in {out}; the text has {ratio:.2f} characters per token\n")
    assert sorted(contents(out)) == ["merges.txt", "vocab.json"]
    learned = Tokenizer.from_directory(out)
    assert (learned.encoder, learned.merges) == (expected.encoder, expected.merges)
    assert call(*TRAIN, "--out", str(tmp_path / "stdin"), "-", stdin=TEXT.encode()).code == 0
    assert contents(tmp_path / "stdin") == contents(out)


def test_files_are_texts_of_their_own(call, text, out):
    assert call(*TRAIN, "--out", str(out), text, "-", text, stdin=b"over").code == 0
    assert Tokenizer.from_directory(out).merges == train_tokenizer([TEXT, "over", TEXT], 280).merges


def test_special_tokens(call, text, out):
    args = (*TRAIN, "--out", str(out), "--special", "<|user|>", "--special", EOS, "--special", "<|bot|>", text)
    assert call(*args).code == 0
    learned = Tokenizer.from_directory(out)
    assert [learned.encoder[token] for token in (EOS, "<|user|>", "<|bot|>")] == [0, 1, 2]
    assert learned.special_tokens == {EOS, "<|user|>", "<|bot|>"}
    assert len(learned) == 280


def test_a_tokenizer_is_replaced_only_by_force(call, text, out):
    Tokenizer.from_directory(SHAKESPEARE).save(out)
    before = contents(out)
    result = call(*TRAIN, "--out", str(out), text)
    message = f"{out} has a tokenizer (vocab.json, merges.txt): choose another --out, or --force to replace it"
    assert result == (1, "", f"gpt-xp: error: {message}\n")
    assert contents(out) == before
    assert call(*TRAIN, "--force", "--out", str(out), text).code == 0
    assert len(Tokenizer.from_directory(out)) == 280


def test_a_tokenizer_json_would_hide_the_new_one(call, text, out):
    out.mkdir(parents=True)
    (out / "tokenizer.json").write_text(json.dumps({}))
    result = call(*TRAIN, "--force", "--out", str(out), text)
    assert result.code == 1
    assert "tokenizer.json would be read in place of a new tokenizer: remove it" in result.err
    assert list(contents(out)) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        ((*TRAIN, "--out", "OUT", "missing.txt"), b"", 1, "missing.txt cannot be read: No such file or directory"),
        ((*TRAIN, "--out", "OUT", "."), b"", 1, ". is a directory: expected a text file"),
        ((*TRAIN, "--out", "OUT", "-"), b"", 1, "is empty: expected text"),
        ((*TRAIN, "--out", "OUT", "-"), b"\xff", 1, "is not UTF-8 text: invalid start byte at byte 0"),
        ((*TRAIN, "--out", "OUT", "-"), b"few", 1, "the text gives no more than 259 tokens"),
        ((*TRAIN, "--out", "TEXT/below", "TEXT"), b"", 1, "is no directory that may be changed"),
        ((*TRAIN, "--out", "TEXT", "TEXT"), b"", 2, "is a file"),
        ((*TRAIN, "--special", "a", "--out", "OUT", "TEXT"), b"", 1, "special token 'a' is what stands for a byte"),
        ((*TRAIN[:-1], "256", "--out", "OUT", "TEXT"), b"", 1, "error: --vocab-size is 256: expected at least 257"),
        ((*TRAIN[:-1], "1e3", "--out", "OUT", "TEXT"), b"", 2, "'1e3' is not a valid integer"),
        ((*TRAIN, "TEXT"), b"", 2, "Missing option '--out'"),
        ((*TRAIN, "--out", "OUT"), b"", 2, "Missing argument"),
        (("tokenizer", "trian", "TEXT"), b"", 2, "No such command 'trian'"),
        (("tokeniser",), b"", 0, "a command's name comes first: gpt-xp tokenizer"),
    ],
)
def test_what_cannot_be_is_one_clear_error(call, text, out, args, stdin, code, message):
    args = [arg.replace("OUT", str(out)).replace("TEXT", text) for arg in args]
    result = call(*args, stdin=stdin)
    assert result.code == code
    assert message in result.err
    assert not out.exists()


@posix
def test_a_closed_stdin_is_an_error(out):
    closing = ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND]
    running = start(*TRAIN, "--out", str(out), "-", command=closing)
    _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (1, b"gpt-xp: error: stdin is closed: expected text\n")


def test_a_full_disk_keeps_what_was_there(call, text, out, monkeypatch):
    assert call(*TRAIN, "--out", str(out), text).code == 0
    before = contents(out)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = call("tokenizer", "train", "--vocab-size", "270", "--force", "--out", str(out), text)
    assert result.code == 1
    assert "No space left on device" in result.err
    assert result.err.count("\n") == 1
    assert contents(out) == before


@posix
def test_ctrl_c_leaves_nothing(out):
    running = start(*TRAIN, "--out", str(out), "-", stdin=subprocess.PIPE)
    running.stdin.write(bytes(300_000))  # more than a pipe holds: so when this returns, the command is reading
    running.stdin.flush()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert b"Traceback" not in err
    assert not out.exists()


@posix
def test_ctrl_c_comes_too_late_while_the_files_are_put_in_place(call, text, out, monkeypatch):
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted)
    assert call(*TRAIN, "--out", str(out), text).code == 0
    assert sorted(contents(out)) == ["merges.txt", "vocab.json"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
