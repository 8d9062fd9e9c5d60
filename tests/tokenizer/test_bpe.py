"""Byte-level BPE against tiktoken, by its definition, and with input that has no tokens."""

import random
import re
import time
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
from folders import SHAKESPEARE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_files import HEROES, HEROES_IDS, PIECES, assert_same, byte_vocabulary, vocabulary_of, write_pair

import gpt_xp.tokenizer.bpe
from gpt_xp.errors import TokenizerError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS

ALL_CHARACTERS = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)


fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


TEXTS = st.lists(
    st.builds(
        str.__mul__,
        st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]),
        st.just(1) | st.integers(1, 40),
    ),
    max_size=12,
).map("".join)


def as_tiktoken(tokenizer):
    """tiktoken's `gpt2` encoding with these ids: in such a vocabulary a merge's rank is the order of its id."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks={tokenizer.token_bytes(id): id for id in tokenizer.ids - {tokenizer.eos_token_id}},
        special_tokens={EOS: tokenizer.eos_token_id},
    )


@pytest.fixture(scope="session")
def tiktoken_gpt2(gpt2):
    return as_tiktoken(gpt2)


def rust_class(pattern):
    """The characters that tiktoken's regex puts in a class: an encoding keeps only what its pattern matches."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    return set(encoding.decode(encoding.encode_ordinary(ALL_CHARACTERS)))


@pytest.fixture(scope="session")
def class_differences():
    """For each class of the pattern, the characters on which `regex` and tiktoken's regex disagree."""
    return {
        pattern: rust_class(pattern) ^ set(regex.findall(pattern, ALL_CHARACTERS))
        for pattern in (r"\s", r"\p{L}", r"\p{N}")
    }


# The numbers everyone knows


def test_heroes(gpt2):
    assert gpt2.encode(HEROES) == HEROES_IDS
    assert gpt2.decode(HEROES_IDS) == HEROES
    assert [gpt2.decoder[id] for id in HEROES_IDS] == ["Not", "Ġall", "Ġheroes", "Ġwear", "Ġcap", "es", "."]
    assert gpt2.encoder["Ġall"] == 477
    assert gpt2.token_bytes(477) == b" all"


def test_sizes(gpt2):
    assert gpt2.n_vocab == len(gpt2) == 50257
    assert gpt2.ids == set(range(50257))
    assert gpt2.eos_token_id == 50256


def test_byte_characters_are_those_of_the_files(gpt2):
    assert [gpt2.token_bytes(id) for id in range(256)] == [
        bytes([byte])
        for byte in [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]
    ]


def test_ids_of_bytes_come_from_the_vocabulary(shakespeare):
    # Here <|endoftext|> is 0 and the bytes begin at 1.
    assert shakespeare.eos_token_id == 0
    assert shakespeare.token_bytes(1) == b"!"
    assert shakespeare.encode("!") == [1]
    assert shakespeare.decode([0, 1]) == "<|endoftext|>!"


# Special tokens


def test_endoftext_is_plain_text_unless_allowed(gpt2, tiktoken_gpt2):
    text = f"one{EOS}  two {EOS}{EOS}"
    assert gpt2.eos_token_id not in gpt2.encode(text)
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode(text, special_tokens=True) == tiktoken_gpt2.encode(text, allowed_special={EOS})
    assert gpt2.encode(text, special_tokens=True).count(50256) == 3
    assert gpt2.decode(gpt2.encode(text, special_tokens=True)) == text


def test_no_endoftext():
    tokenizer = Tokenizer(byte_vocabulary(), [])
    assert tokenizer.eos_token_id is None
    assert tokenizer.decode(tokenizer.encode(EOS, special_tokens=True)) == EOS


def test_the_longest_special_token_wins_and_stands_for_its_own_characters():
    encoder = byte_vocabulary("<pad>", "<pad>2", "né", "né à", EOS)  # é is also what stands for byte 0xe9
    tokenizer = Tokenizer(encoder, [], ["<pad>", "<pad>2", "né", "né à"])
    assert tokenizer.encode("<pad>2<pad>né àné", special_tokens=True) == [257, 256, 259, 258]
    assert tokenizer.decode([259, 258, 257]) == "né àné<pad>2"
    assert tokenizer.special_tokens == {"<pad>", "<pad>2", "né", "né à", EOS}


def test_a_special_token_that_text_can_become_keeps_its_bytes():
    tokenizer = Tokenizer(byte_vocabulary("Ġa"), [("Ġ", "a")], ["Ġa", "é"])
    assert tokenizer.decode(tokenizer.encode("b a é")) == "b a é"


# Against tiktoken


@fuzzed
@given(TEXTS)
@example("I'll don't 'sS  \n\n x\u2028 \x1c\x1d y\x85\xa0z   ")
@example("x" + " " * 5000)
def test_equals_tiktoken(gpt2, tiktoken_gpt2, class_differences, text):
    # Where the two know different versions of Unicode, they cut differently; the next test says where that is.
    differing = set().union(*class_differences.values())
    text = "".join(character for character in text if character not in differing)
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode(text, special_tokens=True) == tiktoken_gpt2.encode(text, allowed_special={EOS})


def test_the_pattern_differs_from_tiktokens_only_on_characters_that_one_of_them_does_not_know(class_differences):
    unassigned = rust_class(r"\p{Cn}") | set(regex.findall(r"\p{Cn}", ALL_CHARACTERS))
    assert class_differences[r"\s"] == set()
    assert class_differences[r"\p{L}"] <= unassigned
    assert class_differences[r"\p{N}"] <= unassigned


def test_equals_tiktoken_on_all_characters(gpt2, tiktoken_gpt2, class_differences):
    characters = sorted(set(ALL_CHARACTERS) - set().union(*class_differences.values()))
    random.Random(0).shuffle(characters)
    text = "".join(characters[:100_000])
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


def test_equals_tiktoken_on_the_small_vocabulary(shakespeare):
    text = (SHAKESPEARE / "config.json").read_text() + "What, ho! ROMEO:\nBut soft, what light\n\n\tthro' yonder…"
    assert shakespeare.encode(text) == as_tiktoken(shakespeare).encode_ordinary(text)


def test_long_words_equal_tiktoken_and_are_not_quadratic(gpt2, tiktoken_gpt2):
    choose = random.Random(0)
    word = "".join(choose.choices("etaoinshrdlucmfw", k=50_000))
    begin = time.perf_counter()
    ids = gpt2.encode(word)
    assert time.perf_counter() - begin < 20  # 0.2 s, where looking at all pairs for each merge takes minutes
    assert ids == tiktoken_gpt2.encode_ordinary(word)


def test_a_word_of_200_000_letters_takes_seconds(gpt2):
    word = "".join(random.Random(0).choices("etaoinshrdlucmfw", k=200_000))  # to walk it for each merge takes hours
    begin = time.perf_counter()
    ids = gpt2.encode(word)
    assert time.perf_counter() - begin < 60
    assert gpt2.decode(ids) == word


# Properties


@fuzzed
@given(TEXTS, st.booleans())
def test_round_trip(gpt2, shakespeare, text, allow_special):
    for tokenizer in (gpt2, shakespeare):
        assert tokenizer.decode(tokenizer.encode(text, special_tokens=allow_special)) == text


@fuzzed
@given(st.binary())
def test_all_bytes_have_tokens(gpt2, data):
    ids = [gpt2.encoder[CHARACTER_OF_BYTE[byte]] for byte in data]
    assert gpt2.decode_bytes(ids) == data
    assert gpt2.decode(ids) == data.decode("utf-8", "replace")


def naive_bpe(ids, ranks):
    """The definition: the lowest rank, then the leftmost, until there is none."""
    while True:
        possible = [(ranks[pair][0], place) for place, pair in enumerate(pairwise(ids)) if pair in ranks]
        if not possible:
            return ids
        _, place = min(possible)
        ids = [*ids[:place], ranks[ids[place], ids[place + 1]][1], *ids[place + 2 :]]


PARTS = st.text("ab", min_size=1, max_size=3)


@fuzzed
@given(st.lists(st.tuples(PARTS, PARTS), unique=True, max_size=12), st.text("ab", max_size=30))
@example([("a", "a")], "aaaaa")
@example([("ab", "a"), ("a", "b")], "ababa")
def test_merges_as_defined(wanted, word):
    known, merges = {"a", "b"}, []
    for left, right in wanted:
        known |= {left, right, left + right}
        merges.append((left, right))
    tokenizer = Tokenizer(byte_vocabulary(*sorted(known - {"a", "b"})), merges)
    ranks = {
        (tokenizer.encoder[left], tokenizer.encoder[right]): (rank, tokenizer.encoder[left + right])
        for rank, (left, right) in enumerate(merges)
    }
    assert tokenizer.encode(word) == naive_bpe([tokenizer.encoder[letter] for letter in word], ranks)


def test_the_order_of_merges_decides():
    merges = [("b", "c"), ("a", "b")]
    encoder = vocabulary_of(merges)
    assert Tokenizer(encoder, merges).encode("abc") == [encoder["a"], encoder["bc"]]
    assert Tokenizer(encoder, merges[::-1]).encode("abc") == [encoder["ab"], encoder["c"]]


def test_the_cache_changes_nothing_and_is_bounded(monkeypatch):
    monkeypatch.setattr(gpt_xp.tokenizer.bpe, "CACHED_WORDS", 3)
    tokenizer = Tokenizer(byte_vocabulary("ab"), [("a", "b")])
    text = "ab ab  ab\nba ab'd ab " + "ab" * 100 + " c d e f ab"
    first = tokenizer.encode(text)
    assert tokenizer.encode(text) == first
    assert tokenizer.decode(first) == text
    assert len(tokenizer._cache) <= 3
    tokenizer.encode("ab" * 100)
    assert "ab" * 100 not in tokenizer._cache


def test_two_tokenizers_do_not_share_a_cache():
    assert Tokenizer(byte_vocabulary("ab"), [("a", "b")]).encode("ab") == [256]
    assert len(Tokenizer(byte_vocabulary("ab"), []).encode("ab")) == 2


def test_the_ids_returned_are_the_callers_own():
    tokenizer = Tokenizer(byte_vocabulary("ab"), [("a", "b")])
    for _ in range(3):
        ids = tokenizer.encode("ab")
        assert ids == [256]
        ids.append(0)


# What cannot be encoded or decoded


@pytest.mark.parametrize("code", [0xD83D, 0xDC80])
def test_lone_surrogates(gpt2, code):
    for allow_special in (False, True):
        with pytest.raises(TokenizerError, match=f"character 5 .*U\\+{code:04X}.*'replace'"):
            gpt2.encode(f"hello{chr(code)}", special_tokens=allow_special)


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["a"]])
def test_what_is_no_text(gpt2, text):
    with pytest.raises(TokenizerError, match=f"not {type(text).__name__}"):
        gpt2.encode(text)


@pytest.mark.parametrize("id", [-1, 50257, 2**70, np.int64(-1), np.int32(60000)])
def test_ids_without_a_token(gpt2, id):
    for call in (gpt2.token_bytes, lambda id: gpt2.decode([0, id]), lambda id: gpt2.decode_bytes([id])):
        with pytest.raises(TokenizerError, match=rf"token id {int(id)} has no token: ids are 0 to 50256$"):
            call(id)


@pytest.mark.parametrize("id", [True, False, np.True_, 1.0, np.float32(1), "1", None, [1], np.array([1])])
def test_what_is_no_id(gpt2, id):
    with pytest.raises(TokenizerError, match="expected an integer, not"):
        gpt2.decode([id])


def test_what_is_no_sequence_of_ids(gpt2):
    for ids in (5, np.array(5), None):
        with pytest.raises(TokenizerError, match="expected a sequence of token ids"):
            gpt2.decode(ids)


def test_ids_of_numpy(gpt2):
    for dtype in (np.int32, np.int64, np.uint16):
        assert gpt2.decode(np.array(HEROES_IDS, dtype=dtype)) == HEROES
        assert gpt2.decode(list(np.array(HEROES_IDS, dtype=dtype))) == HEROES
    assert gpt2.decode(iter(HEROES_IDS)) == HEROES
    assert gpt2.token_bytes(np.int64(477)) == b" all"


def test_incomplete_characters(gpt2):
    ids = gpt2.encode("😀")
    assert len(ids) > 1
    assert gpt2.decode(ids[:1]) == "\ufffd"
    assert gpt2.decode(ids[:1], errors="ignore") == ""
    for errors in ("strict", "no such handler"):
        with pytest.raises(TokenizerError, match=f"errors='{errors}'"):
            gpt2.decode(ids[:1], errors=errors)


# Ids with gaps


def test_ids_may_have_gaps(tmp_path):
    tokenizer = Tokenizer(byte_vocabulary("ab", first=10) | {EOS: 999}, [("a", "b")])
    assert tokenizer.ids == {*range(10, 10 + 257), 999}
    assert (len(tokenizer), tokenizer.n_vocab, tokenizer.eos_token_id) == (258, 1000, 999)
    with pytest.raises(TokenizerError, match="token id 500 has no token: ids are 0 to 999, with gaps"):
        tokenizer.decode([500])
    tokenizer.save(tmp_path)
    assert_same(Tokenizer.from_directory(tmp_path), tokenizer)


# Parts that do not fit each other


@pytest.mark.parametrize(
    ("encoder", "merges", "special", "message"),
    [
        ({}, [], [], "encoder has no tokens"),
        ({"▁a": 0}, [], [], "encoder: not byte-level BPE: it has no token for a byte"),
        (byte_vocabulary(), [("a", "b")], [], r"merges\[0\]: 'a' \+ 'b': 'ab' has no id"),
        (byte_vocabulary("ab"), [("a", "b"), ("ab", "xyz")], [], r"merges\[1\]: .*: 'xyz' has no id"),
        (byte_vocabulary("ab"), [("xyz", "b")], [], "'xyz' has no id"),
        (byte_vocabulary() | {"ab": 97}, [], [], "'a' and 'ab' have the same id 97"),
        (byte_vocabulary() | {"ab": -1}, [], [], "the id of 'ab' is -1"),
        (byte_vocabulary() | {"ab": True}, [], [], "the id of 'ab' is True"),
        (byte_vocabulary() | {"ab": 300.0}, [], [], "the id of 'ab' is 300.0"),
        (byte_vocabulary() | {"ab": "300"}, [], [], "the id of 'ab' is '300'"),
        (byte_vocabulary() | {"ab": None}, [], [], "the id of 'ab' is None"),
        (byte_vocabulary("\ud800"), [], [], "lone surrogate"),
        (byte_vocabulary(), [], ["<pad>"], "the added token '<pad>' is empty or has no id"),
        (byte_vocabulary(""), [], [""], "the added token '' is empty"),
        (byte_vocabulary(EOS[:-1], EOS), [(EOS[:-1], ">")], [], r"merges\[0\]: makes <\|endoftext\|>"),
    ],
)
def test_parts_that_do_not_fit(encoder, merges, special, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(encoder, merges, special)


def test_a_vocabulary_without_some_bytes(tmp_path):
    merges = [("o", "r"), ("Ġ", "or")]
    whole = byte_vocabulary("or", "Ġor", EOS)
    known = {token: id for token, id in whole.items() if token not in ("q", "ĉ", "Ã")}
    write_pair(tmp_path, known, "o r\nĠ or\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("or or") == Tokenizer(whole, merges).encode("or or")
    assert tokenizer.decode(tokenizer.encode("or or")) == "or or"
    for text, byte in (("or quiet", "0x71 in ' quiet'"), ("a\tb", "0x09 in '\\t'"), ("é", "0xc3 in 'é'")):
        for _ in range(2):  # the word must not be remembered without its byte
            with pytest.raises(TokenizerError, match=f"the text has the byte {re.escape(byte)}, .* no token for it"):
                tokenizer.encode(text)
    tokenizer.save(tmp_path / "saved")
    assert_same(Tokenizer.from_directory(tmp_path / "saved"), tokenizer)
