"""The files of a tokenizer: each layout is read, and each broken file is one error with its place."""

import json

import pytest
import regex
from tokenizer_files import (
    ODD_MERGES,
    ODD_VOCABULARY,
    assert_same,
    byte_vocabulary,
    tokenizer_json,
    write_pair,
    write_tokenizer_json,
)

from gpt_xp.errors import TokenizerError
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tokenizer.words import EOS


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
