"""Added tokens, their roles, and what goes before a text: as transformers' GPT2Tokenizer has them."""

import importlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_xp import Tokenizer
from gpt_xp.errors import TokenizerError
from gpt_xp.tokenizer.added_tokens import AddedToken

make = importlib.import_module("make_added_tokens")
GOLDENS = json.loads(make.GOLDEN.read_text(encoding="utf-8"))
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def read(directory: Path, files: dict) -> Tokenizer:
    make.write_case(directory, files)
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("name", make.CASES)
def test_the_ids_and_roles_of_transformers(name, tmp_path):
    tokenizer = read(tmp_path, make.CASES[name])
    for text, ids in zip(make.TEXTS, GOLDENS[name]["ids"], strict=True):
        assert tokenizer.encode(text, special_tokens=True) == ids  # transformers allows them always
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (GOLDENS[name]["bos"], GOLDENS[name]["eos"])


@pytest.mark.parametrize("name", make.CASES)
def test_what_is_saved_means_the_same(name, tmp_path):
    (tmp_path / "read").mkdir()
    tokenizer = read(tmp_path / "read", make.CASES[name])
    in_memory = Tokenizer(
        tokenizer.encoder,
        tokenizer.merges,
        added_tokens=tokenizer.added_tokens,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_bos_token=tokenizer.add_bos_token,
        add_prefix_space=tokenizer.add_prefix_space,
    )
    for number, each in enumerate((tokenizer, in_memory)):
        each.save(tmp_path / str(number))
        again = Tokenizer.from_directory(tmp_path / str(number))
        assert again.special_tokens == tokenizer.special_tokens
        assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        for text, ids in zip(make.TEXTS, GOLDENS[name]["ids"], strict=True):
            assert again.encode(text, special_tokens=True) == ids


def test_the_files_beside_the_vocabulary_are_saved_as_they_were(tmp_path):
    files = make.CASES["roles beside a tokenizer.json"] | {
        "tokenizer_config.json": {"model_max_length": 1024, "x": [1]}
    }
    (tmp_path / "read").mkdir()
    read(tmp_path / "read", files).save(tmp_path / "saved")
    for name in files:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "read" / name).read_bytes()


def test_statements_of_an_older_tokenizer_do_not_speak_for_a_new_one(tmp_path):
    files = make.CASES["roles in special_tokens_map.json"] | {"tokenizer_config.json": {"add_prefix_space": True}}
    make.write_case(tmp_path, files)
    Tokenizer(make.VOCABULARY, []).save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert (again.encoder, again.special_tokens) == (make.VOCABULARY, {make.EOS})
    assert again.encode("<s>To") == [make.VOCABULARY[each] for each in "<s>To"]


def test_words_are_found_in_any_text_and_special_tokens_where_they_are_allowed(tmp_path):
    tokenizer = read(tmp_path, make.CASES["more special tokens"])
    word, speaker = make.WORDS["dignums"], make.WORDS["<speaker1>"]
    assert tokenizer.special_tokens == {"<speaker1>", make.EOS}
    assert tokenizer.encode("dignums<speaker1>dignums", special_tokens=True) == [word, speaker, word]
    ids = tokenizer.encode("dignums<speaker1>dignums")
    assert (ids[0], ids[-1]) == (word, word)
    assert speaker not in ids
    assert tokenizer.decode(ids) == "dignums<speaker1>dignums"


def test_which_special_token_a_text_spells(tmp_path):
    tokenizer = read(tmp_path, make.CASES["more special tokens"])
    assert tokenizer.first_special(f"a dignums <speaker1> b {make.EOS}") == "<speaker1>"
    assert tokenizer.first_special("a dignums <speaker b") is None


def test_an_added_token_stands_for_its_own_characters(tmp_path):
    tokenizer = read(tmp_path, make.CASES["letters beyond ASCII"])
    text = "né à éé Ġbe"
    assert tokenizer.decode(tokenizer.encode(text, special_tokens=True)) == text


CONTENTS = st.sampled_from(["<a>", "ab", "b a", " <b>", "a\n", "é", "<a><a>", "b", "\n\nb"])
ADDED = st.lists(st.builds(AddedToken, CONTENTS, *[st.booleans()] * len(FLAGS)), unique_by=lambda each: each.content)
PARTS = st.sampled_from(["<a>", "<b>", "a", "b", " ", "  ", "\n", "é", "_", ",", "<"])


@settings(max_examples=300, deadline=None)
@given(ADDED, st.lists(PARTS), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_a_text_in_pieces_has_the_ids_of_the_whole(added, parts, special, prefix, begin, data):
    vocabulary = make.VOCABULARY | {
        token.content: id for id, token in enumerate(added, make.END) if token.content not in make.VOCABULARY
    }
    tokenizer = Tokenizer(vocabulary, [], added_tokens=added, add_prefix_space=prefix, add_bos_token=begin)
    text = "".join(parts)
    # So text_stream cuts: white space begins each piece but the first, and follows something else.
    cuts = [place for place in range(1, len(text)) if text[place].isspace() and not text[place - 1].isspace()]
    chosen = sorted(data.draw(st.sets(st.sampled_from(cuts)))) if cuts else []
    pieces = [text[begin:end] for begin, end in zip([0, *chosen], [*chosen, len(text)], strict=True)]
    ids = [id for part in tokenizer.encode_pieces(pieces, special_tokens=special) for id in part]
    assert ids == tokenizer.encode(text, special_tokens=special)


def test_a_single_word_is_cut_off_with_what_stands_before_it():
    token = AddedToken(" <b>", special=False, single_word=True)
    tokenizer = Tokenizer(make.VOCABULARY | {" <b>": make.END}, [], added_tokens=[token])
    for text in ("a <b>", "_ <b>", ", <b>"):
        assert [id for ids in tokenizer.encode_pieces([text[0], text[1:]]) for id in ids] == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"add_eos_token": True}}, "tokenizer_config.json: add_eos_token is true"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is not an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder is not an object"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"300": {}}}},
            r"added_tokens_decoder\[300\] has no content",
        ),
        ({"tokenizer_config.json": make.listed(make.token("be", lstrip=1))}, r"lstrip is 1, expected true or false"),
        ({"tokenizer_config.json": make.listed(make.token("To"))}, "'To' is 266, but 256 in the vocabulary"),
        ({"special_tokens_map.json": {"pad_token": {"lstrip": True}}}, "pad_token has no content"),
        ({"special_tokens_map.json": [1]}, "special_tokens_map.json is not a JSON object"),
        (
            {"tokenizer.json": make.tokenizer_json(post_processor=make.template("A", make.EOS))},
            "post_processor.single .* expected the text alone, or one token before it",
        ),
    ],
)
def test_statements_that_cannot_be_kept_are_refused_by_name(files, message, tmp_path):
    with pytest.raises(TokenizerError, match=message):
        read(tmp_path, files)


@pytest.mark.oracle
def test_goldens_are_what_transformers_finds():
    pytest.importorskip("transformers", reason="the oracle is transformers")
    assert json.loads(json.dumps(make.goldens())) == GOLDENS


@pytest.mark.oracle
def test_any_added_tokens_as_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="the oracle is transformers")
    choose = random.Random(0)
    contents = ["<a>", "ab", "b a", " <b>", "a\n", "éé", "<a><a>", "be", "\n\nb", "\u00a0"]
    parts = ["<a>", "<b>", "a", "b", " ", "  ", "\n", "é", "_", ",", "<", "\u00a0", "\u0301", "To", "be"]
    for number in range(60):
        added = [
            make.token(content, **{flag: choose.random() < 0.3 for flag in FLAGS})
            for content in choose.sample(contents, choose.randint(1, 5))
        ]
        files = choose.choice(
            [{"tokenizer.json": make.tokenizer_json(*added)}, {"tokenizer_config.json": make.listed(*added)}]
        )
        files.setdefault("tokenizer_config.json", {})["add_prefix_space"] = choose.random() < 0.5
        texts = ["".join(choose.choices(parts, k=choose.randint(0, 15))) for _ in range(20)]
        directory = tmp_path / str(number)
        directory.mkdir()
        ours = read(directory, {name: dict(content) for name, content in files.items()})
        found = make.transformers_finds(files, texts)["ids"]
        assert [ours.encode(text, special_tokens=True) for text in texts] == found, files
