"""Tokenizers and their files for tests, made by hand."""

import json

from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS

HEROES = "Not all heroes wear capes."
HEROES_IDS = [3673, 477, 10281, 5806, 1451, 274, 13]


# They contain whitespace, contractions and texts that look similar, digits of other scripts, emoji with joiners and
# skin tones, combining marks, special tokens, and characters of one to four bytes.
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
    """Return the tokenizer.json that transformers 5 writes for GPT-2; a change has a name such as "model__dropout"."""
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


# Pairs of files

ODD_MERGES = [("#", "#"), ("#version", "x"), ("Â", "ħ"), ("é", "a")]
ODD_VOCABULARY = byte_vocabulary("##", "#version", "x y", "#versionx", "Âħ", "éa")
