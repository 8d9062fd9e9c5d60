"""Learning a vocabulary, against Hugging Face's `tokenizers` (goldens) and against a recount for each merge."""

import json
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from folders import GOLDEN_FILES
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpt_xp
from gpt_xp import Tokenizer, train_tokenizer
from gpt_xp.errors import SettingError, TokenizerError
from gpt_xp.tokenizer.text_files import text_pieces
from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS, WORD

GOLDENS = json.loads((GOLDEN_FILES / "tokenizers.json").read_text(encoding="utf-8"))
PROSE = GOLDENS["prose"]["texts"][0]

# Few letters and many words: almost every choice is between equally frequent pairs.
WORDS = st.text("ab", max_size=9) | st.text("aé-", max_size=12)
TEXTS = st.lists(st.lists(WORDS, max_size=15).map(" ".join), max_size=4)


def recounted(texts: list[str], vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges, by counting all pairs of all words again for each merge; fewer where no pair is left."""
    tokens = [EOS, *sorted(CHARACTER_OF_BYTE)]
    words = [[CHARACTER_OF_BYTE[byte] for byte in word.encode()] for text in texts for word in WORD.findall(text)]
    merges = []
    while len(tokens) < vocab_size:
        frequency = Counter(pair for word in words for pair in pairwise(word))
        if not frequency:
            break
        left, right = min(frequency, key=lambda pair: (-frequency[pair], *map(tokens.index, pair)))
        for word in words:
            for i in range(len(word)):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
        tokens.append(left + right)
        merges.append((left, right))
    return tokens, merges


def assert_learned(tokenizer: Tokenizer, tokens: list[str], merges: list) -> None:
    assert list(tokenizer.encoder.items()) == [(token, id) for id, token in enumerate(tokens)]
    assert tokenizer.merges == [tuple(merge) for merge in merges]


@pytest.mark.parametrize("name", GOLDENS)
def test_what_tokenizers_learns(name):
    case = GOLDENS[name]
    tokenizer = train_tokenizer(case["texts"], case["vocab_size"], case["special_tokens"])
    assert len(tokenizer) == case["vocab_size"]
    assert_learned(tokenizer, case["tokens"], case["merges"])
    assert tokenizer.special_tokens == set(case["special_tokens"])


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(257, 300))
@example(["aaaaa aaa aa"], 261)
def test_what_a_recount_learns(texts, vocab_size):
    tokens, merges = recounted(texts, vocab_size)
    if len(tokens) < vocab_size:
        with pytest.raises(
            TokenizerError, match=f"gives no more than {len(tokens)} tokens, .*; {vocab_size} were asked"
        ):
            train_tokenizer(texts, vocab_size)
    tokenizer = train_tokenizer(texts, len(tokens))
    assert_learned(tokenizer, tokens, merges)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_file_in_pieces_is_learned_as_a_whole(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE.encode())
    pieces = list(text_pieces([path], n_bytes=50))
    assert len(pieces) > 9
    assert_learned(train_tokenizer(iter(pieces), 560), GOLDENS["prose"]["tokens"], GOLDENS["prose"]["merges"])


def test_no_merge_makes_a_special_token():
    texts = ["abab abab abc abc"]
    special = [EOS, "ab", "Ġa"]
    tokenizer = train_tokenizer(texts, 261, special)
    assert len(set(tokenizer.encoder)) == 261
    assert not {left + right for left, right in tokenizer.merges} & set(special)
    assert tokenizer.encode("ab", special_tokens=True) == [1]
    assert tokenizer.decode(tokenizer.encode("ab abab Ġa")) == "ab abab Ġa"
    assert not {1, 2} & set(tokenizer.encode("ab abab Ġa"))


def test_what_is_learned_is_saved_and_read(tmp_path):
    tokenizer = train_tokenizer([PROSE], 300, [EOS, "<|user|>"])
    tokenizer.save(tmp_path)
    read = Tokenizer.from_directory(tmp_path)
    assert (read.encoder, read.merges) == (tokenizer.encoder, tokenizer.merges)
    assert read.special_tokens == {EOS, "<|user|>"}


def test_every_token_is_told_of():
    told = []
    train_tokenizer([PROSE], 300, advance=told.append)
    assert told == [1] * (300 - 257)


def test_a_long_word_takes_no_long_time():
    assert len(train_tokenizer(["ab" * 100_000], 270)) == 270


def never():
    """Texts that must not be read."""
    pytest.fail("a text was read")
    yield


@pytest.mark.parametrize(
    ("vocab_size", "special", "message"),
    [
        (256, [EOS], "vocab_size is 256: expected at least 257, for 256 bytes and 1 special token$"),
        (255, [], "expected at least 256, for 256 bytes and 0 special tokens$"),
        (-1, [EOS, "<s>"], "vocab_size is -1: expected at least 258"),
        (1e3, [EOS], r"vocab_size is 1000\.0: expected an integer"),
        ("1000", [EOS], "vocab_size is '1000': expected an integer"),
        (True, [EOS], "vocab_size is True: expected an integer"),
        (300, EOS, r"special_tokens is one str, expected a list: \['<|endoftext|>'\]"),
        (300, [EOS, ""], "special token '': expected a str of one character or more"),
        (300, [EOS, 7], "special token 7: expected a str"),
        (300, [EOS, "<s>", EOS], r"special token '<\|endoftext\|>' is there twice"),
        (300, ["Ġ"], "special token 'Ġ' is what stands for a byte"),
    ],
)
def test_bad_settings_are_told_before_a_text_is_read(vocab_size, special, message):
    with pytest.raises(SettingError, match=message):
        train_tokenizer(never(), vocab_size, special)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "texts is one str, expected an iterable of them"),
        ([b"bytes"], r"expected text \(str\), not bytes"),
        (["fine", "\ud800"], "lone surrogate"),
        ([], "no more than 257 tokens"),
    ],
)
def test_what_is_no_text_is_told(texts, message):
    with pytest.raises(TokenizerError, match=message):
        train_tokenizer(texts, 300)
    with pytest.raises(TokenizerError, match="lone surrogate"):
        train_tokenizer(never(), 300, ["\ud800"])


def test_an_integer_of_numpy_is_one():
    assert len(train_tokenizer([PROSE], np.int64(300))) == 300
    assert "train_tokenizer" in gpt_xp.__all__


# Against `tokenizers` itself


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[dev,oracle]'")
    import make_tokenizers

    return make_tokenizers.learn


@pytest.mark.oracle
def test_goldens_are_what_tokenizers_learns(learn):
    assert json.loads(json.dumps(sys.modules["make_tokenizers"].goldens())) == GOLDENS


@pytest.mark.oracle
def test_any_text_is_learned_as_tokenizers_does(learn):
    pieces = st.sampled_from(
        [*" \n\t\xa0", "  ", "'ll", "don't", "the", "漢字", "é", "e\u0301", "😀", "---", "12", EOS]
    )
    texts = st.lists(st.lists(pieces | WORDS, max_size=30).map("".join), max_size=4)

    @settings(max_examples=300, deadline=None)
    @given(texts, st.integers(257, 300))
    def compare(texts, vocab_size):
        theirs = learn(texts, vocab_size, [EOS])
        assert_learned(train_tokenizer(texts, len(theirs["tokens"])), theirs["tokens"], theirs["merges"])

    compare()
