"""Text, its token ids on disk, and batches of them."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_trainings import story

import gpt_xp
from gpt_xp.errors import CheckpointError
from gpt_xp.training import corpus
from gpt_xp.training.corpus import Span, crops, validation_rows
from gpt_xp.training.settings import TrainingSettings


def test_the_corpus_is_the_text(tmp_path: Path) -> None:
    texts = [story(400, seed) + "end  \n\n" for seed in range(3)]
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file, content in zip(files, texts, strict=True):
        file.write_bytes(content.encode())
    settings = TrainingSettings(data=tuple(map(str, files)), val_fraction=0.25)
    spans = corpus.split(settings)
    whole = "".join(texts)
    cut = int(0.75 * len(whole))
    assert "".join(corpus.text_of(spans[0])) == whole[:cut]
    assert "".join(corpus.text_of(spans[1])) == whole[cut:]
    tokenizer = gpt_xp.train_tokenizer(texts, 277)
    corpus.tokenize(spans, tokenizer, tmp_path, n_vocab=277)
    found = corpus.open_corpus(tmp_path, tokenizer, 5)
    assert found.train.dtype == np.uint16
    end = tokenizer.eos_token_id
    assert tokenizer.decode([id for id in found.train if id != end]) == whole[:cut]
    assert tokenizer.decode(found.val) == whole[cut:]
    boundaries = [
        len(tokenizer.decode(found.train[:i]).replace(gpt_xp.tokenizer.bpe.EOS, ""))
        for i in np.flatnonzero(found.train == end)
    ]
    assert boundaries == [len(texts[0]), len(texts[0]) + len(texts[1])]
    assert (found.counts.train_characters, found.counts.val_characters) == (cut, len(whole) - cut)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from gpt_xp.tokenizer.bpe import Tokenizer
    from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS

    tokenizer = Tokenizer({character: 70_000 + i for i, character in enumerate(CHARACTER_OF_BYTE)} | {EOS: 3}, [])
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    spans = (Span((str(tmp_path / "t.txt"),), 0, 90), Span((str(tmp_path / "t.txt"),), 90))
    corpus.tokenize(spans, tokenizer, tmp_path, n_vocab=tokenizer.n_vocab)
    found = corpus.open_corpus(tmp_path, tokenizer, 5)
    assert tokenizer.decode(found.train) == "abcdefghij" * 9


def test_a_first_token_begins_each_file(tmp_path: Path) -> None:
    learned = gpt_xp.train_tokenizer([story(300)], 277)
    tokenizer = gpt_xp.Tokenizer(learned.encoder, learned.merges, add_bos_token=True, add_prefix_space=True)
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(story(300) * 100)  # several pieces
    span = Span((str(tmp_path / "1.txt"), str(tmp_path / "2.txt")))
    corpus.tokenize((span, span), tokenizer, tmp_path, n_vocab=277)
    each = tokenizer.encode(story(300) * 100)
    assert corpus.open_corpus(tmp_path, tokenizer, 5).train.tolist() == [*each, tokenizer.eos_token_id, *each]


def test_a_file_system_that_maps_no_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    tokenizer = gpt_xp.train_tokenizer([story(300)], 277)
    (tmp_path / "t.txt").write_text(story(300))
    span = Span((str(tmp_path / "t.txt"),))
    corpus.tokenize((span, span), tokenizer, tmp_path, n_vocab=277)
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(CheckpointError, match=r"train\.bin is on a file system that cannot map .*copy its directory"):
        corpus.open_corpus(tmp_path, tokenizer, 5)


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
@pytest.mark.parametrize("change", ["shorter", "empty", "missing"])
def test_damaged_token_files_are_told(tmp_path: Path, file: str, change: str) -> None:
    tokenizer = gpt_xp.train_tokenizer([story(300)], 277)
    (tmp_path / "t.txt").write_text(story(300))
    span = Span((str(tmp_path / "t.txt"),))
    corpus.tokenize((span, span), tokenizer, tmp_path, n_vocab=277)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink() if change == "missing" else (tmp_path / file).write_bytes(
        whole[: len(whole) // 2] * (change == "shorter")
    )
    with pytest.raises(CheckpointError, match=f"{file} is damaged: it has .* bytes, and .* tokens were written"):
        corpus.open_corpus(tmp_path, tokenizer, 5)


def test_crops_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    a = crops(tokens, 13, 7, seed=1, step=5)
    assert a.shape == (7, 14)
    assert a.dtype == np.int32
    assert (np.diff(a) == 1).all()
    np.testing.assert_array_equal(a, crops(tokens, 13, 7, seed=1, step=5))
    assert not np.array_equal(a, crops(tokens, 13, 7, seed=1, step=6))
    assert not np.array_equal(a, crops(tokens, 13, 7, seed=2, step=5))
    many = crops(tokens, 998, 100, seed=0, step=0)  # both places there are, and no other
    assert set(many[:, 0]) == {0, 1}


def test_windows_predict_each_token_once() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    rows = validation_rows(tokens, 13, most=10_000)
    assert rows.shape == (7, 14)
    assert rows[:, 1:].reshape(-1).tolist() == list(range(1, 92))
    assert validation_rows(tokens, 13, most=40).tolist() == [rows[i].tolist() for i in (0, 3, 6)]
    assert validation_rows(tokens[:5], 13, most=40).tolist() == [[0, 1, 2, 3, 4]]
    assert len(validation_rows(tokens, 13, most=1)) == 1
