"""A tokenizer is saved, read back, and read by transformers; a failure leaves the former files."""

import errno
import os
import random
from pathlib import Path

import pytest
import regex
from folders import SHAKESPEARE
from tokenizer_files import (
    HEROES,
    ODD_MERGES,
    ODD_VOCABULARY,
    PIECES,
    assert_same,
    byte_vocabulary,
    write_tokenizer_json,
)

from gpt_xp.errors import CheckpointError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.words import EOS

# Saving


def test_save_and_read_back(tmp_path, gpt2, shakespeare):
    for tokenizer in (gpt2, shakespeare, Tokenizer(ODD_VOCABULARY, ODD_MERGES)):
        tokenizer.save(tmp_path / "new" / "directory")
        assert_same(Tokenizer.from_directory(tmp_path / "new" / "directory"), tokenizer)
    assert sorted(os.listdir(tmp_path / "new" / "directory")) == ["merges.txt", "vocab.json"]


def test_save_writes_the_bytes_it_read(tmp_path, shakespeare):
    shakespeare.save(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == (SHAKESPEARE / "merges.txt").read_bytes()


def test_save_keeps_special_tokens_and_drops_those_of_before(tmp_path):
    special = Tokenizer(byte_vocabulary("é à", "<pad>", EOS), [], ["é à", "<pad>"])
    special.save(tmp_path)
    assert_same(Tokenizer.from_directory(tmp_path), special)
    plain = Tokenizer(byte_vocabulary("ab"), [("a", "b")])
    plain.save(tmp_path)
    assert_same(Tokenizer.from_directory(tmp_path), plain)


def test_save_beside_a_tokenizer_json(tmp_path, shakespeare):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json would be read in place"):
        shakespeare.save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_save_beside_its_own_tokenizer_json(tmp_path):
    merges = [("a", "b")]
    write_tokenizer_json(tmp_path, byte_vocabulary("ab"), merges)
    Tokenizer.from_directory(tmp_path).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["merges.txt", "tokenizer.json", "vocab.json"]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json would be read in place"):
        Tokenizer(byte_vocabulary("ba"), [("b", "a")]).save(tmp_path)


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, shakespeare, failing):
    Tokenizer(ODD_VOCABULARY, ODD_MERGES).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(path, content):
        if "merges" in path.name:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_bytes(path, content)

    def refuse(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(Path, "write_bytes", full)
        else:
            patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match=f"cannot be written to {regex.escape(str(tmp_path))}: .*rror|left"):
            shakespeare.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_where_a_file_is(tmp_path, shakespeare):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            shakespeare.save(directory)


# Against transformers


def transformers_tokenizer(name, directory):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    return getattr(transformers, name).from_pretrained(directory)


ORACLE_TEXTS = [
    HEROES,
    f"one{EOS} two",
    "I'll  don't\n\n\t 'S x\u2028\x1c\x1d y\x85\xa0z ½ ٣٤ 👩‍👩‍👧 e\u0301 漢字   ",
    "# # ## #version: 0.2 Ġ Â\x85",
    " ".join(PIECES),
    "".join(PIECES),
]


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "AutoTokenizer"])
@pytest.mark.parametrize("which", ["gpt2", "shakespeare"])
def test_transformers_reads_what_we_save(tmp_path, request, name, which):
    ours = request.getfixturevalue(which)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers_tokenizer(name, tmp_path)
    assert theirs.get_vocab() == ours.encoder
    for text in ORACLE_TEXTS:
        ids = ours.encode(text, special_tokens=True)  # transformers allows it always
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids) == text


@pytest.mark.oracle
def test_we_read_what_transformers_saves(tmp_path):
    theirs = transformers_tokenizer("GPT2Tokenizer", SHAKESPEARE)
    theirs.add_tokens(["[PAD]", "né à"])
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / "merges.txt").exists()
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.encoder == theirs.get_vocab()
    assert ours.special_tokens == {EOS}
    for text in [*ORACLE_TEXTS, "a [PAD] b né à[PAD]"]:
        assert ours.encode(text, special_tokens=True) == theirs.encode(text)
    ours.save(tmp_path / "saved")
    again = transformers_tokenizer("GPT2Tokenizer", tmp_path / "saved")
    assert again.encode("a [PAD] b né à[PAD]") == ours.encode("a [PAD] b né à[PAD]")


@pytest.mark.oracle
def test_merges_in_any_order_as_in_tokenizers(tmp_path):
    # Merges that use a token before the merge that makes it: the lowest rank wins as soon as it is possible.
    tokenizers = pytest.importorskip("tokenizers", reason="the oracle is the tokenizers of transformers")
    choose = random.Random(0)
    for _ in range(200):
        parts = ["".join(choose.choices("ab", k=choose.randint(1, 3))) for _ in range(16)]
        merges = list(dict.fromkeys(zip(parts[::2], parts[1::2], strict=True)))
        known = {token for left, right in merges for token in (left, right, left + right)} - {"a", "b"}
        write_tokenizer_json(tmp_path, byte_vocabulary(*sorted(known)), merges)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ours = Tokenizer.from_directory(tmp_path)
        for _ in range(5):
            word = "".join(choose.choices("ab", k=20))
            assert ours.encode(word) == theirs.encode(word).ids
