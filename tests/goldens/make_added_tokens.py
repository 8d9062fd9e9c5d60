"""Make added_tokens.json: the ids that transformers' GPT2Tokenizer finds where tokens were added, or have a role.

    pip install -e '.[dev,oracle]'
    python tests/goldens/make_added_tokens.py

`tests/tokenizer/test_added_tokens.py` compares with it, and (with `-m oracle`) makes it again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "added_tokens.json"
EOS = "<|endoftext|>"
MERGES = ["T o", "Ġ b", "Ġb e", "d i", "o r", "e r", "Ġ s", "Ġs p", "Ġ Ġ"]


def byte_characters() -> list[str]:
    """Return the character that stands for each byte, as openai/gpt-2 `encoder.py` has them."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]


VOCABULARY = {token: id for id, token in enumerate([*byte_characters(), *(m.replace(" ", "") for m in MERGES), EOS])}
END = len(VOCABULARY)  # the first id that is free


def token(content: str, **flags: bool) -> dict[str, Any]:
    """Return an added token as the files write it, not special and with no flags but those given."""
    none = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content} | none | flags


def tokenizer_json(*added: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the content of a tokenizer.json with those tokens added, from the first free id on."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": VOCABULARY[EOS], **token(EOS, special=True)},
            *({"id": id} | each for id, each in enumerate(added, END)),
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [merge.split(" ") for merge in MERGES]},
    } | fields


def listed(*added: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of tokenizer_config.json that lists tokens, from the first free id on."""
    return {"added_tokens_decoder": {str(id): each for id, each in enumerate(added, END)}}


def template(*pieces: str) -> dict[str, Any]:
    """Return a template of <|endoftext|> and the text, "A"."""
    single = [{"Sequence" if each == "A" else "SpecialToken": {"id": each, "type_id": 0}} for each in pieces]
    special = {EOS: {"id": EOS, "ids": [VOCABULARY[EOS]], "tokens": [EOS]}}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *single], "special_tokens": special}


WORDS = {"dignums": END, "<speaker1>": END + 1}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
# The files beside vocab.json and merges.txt, or with a tokenizer.json in their place.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "nothing added": {},
    "words in added_tokens.json": {"added_tokens.json": WORDS},
    "words in tokenizer.json": {"tokenizer.json": tokenizer_json(token("dignums"), token("<speaker1>"))},
    "words in tokenizer_config.json": {"tokenizer_config.json": listed(token("dignums"), token("<speaker1>"))},
    "roles in special_tokens_map.json": {
        "added_tokens.json": {"<s>": END, "</s>": END + 1, "[PAD]": END + 2, "dignums": END + 3},
        "special_tokens_map.json": ROLES | {"bos_token": token("<s>", lstrip=True)},
    },
    "roles in tokenizer_config.json": {
        "added_tokens.json": {"<s>": END, "</s>": END + 1, "[PAD]": END + 2},
        "tokenizer_config.json": ROLES | {"additional_special_tokens": None, "sep_token": None},
    },
    "roles beside a tokenizer.json": {
        "tokenizer.json": tokenizer_json(token("<s>", special=True), token("</s>", special=True, normalized=True)),
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "a role without an id": {"special_tokens_map.json": {"pad_token": "[PAD]"}},
    "more special tokens": {
        "added_tokens.json": WORDS,
        "special_tokens_map.json": {"additional_special_tokens": ["<speaker1>"]},
    },
    "lstrip and rstrip": {
        "tokenizer_config.json": listed(
            token("dignums", rstrip=True), token("<s>", lstrip=True, rstrip=True), token("[PAD]", lstrip=True)
        )
    },
    "single words": {
        "tokenizer_config.json": listed(token("dignums", single_word=True), token("be", single_word=True))
    },
    "not normalized before normalized": {
        "tokenizer_config.json": listed(
            token("numsTo"), token("dignums", normalized=True), token("dig", normalized=True)
        )
    },
    "one token within another": {
        "tokenizer_config.json": listed(token("be"), token("ber"), token(" be"), token("er T"))
    },
    "letters beyond ASCII": {"tokenizer_config.json": listed(token("né à"), token("éé", special=True))},
    "a prefix space": {"added_tokens.json": WORDS, "tokenizer_config.json": {"add_prefix_space": True}},
    "a prefix space beside a tokenizer.json": {
        "tokenizer.json": tokenizer_json(token("dignums"), token("<s>", rstrip=True)),
        "tokenizer_config.json": {"add_prefix_space": True},
    },
    "no prefix space, whatever tokenizer.json says": {
        "tokenizer.json": tokenizer_json(pre_tokenizer=tokenizer_json()["pre_tokenizer"] | {"add_prefix_space": True}),
        "tokenizer_config.json": {"add_prefix_space": False},
    },
    "a first token": {"tokenizer_config.json": {"add_bos_token": True}},
    "a first token with a prefix space": {"tokenizer_config.json": {"add_bos_token": True, "add_prefix_space": True}},
    "a first token by its role": {
        "added_tokens.json": {"<s>": END},
        "tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"},
    },
    "a first token in a template": {"tokenizer.json": tokenizer_json(post_processor=template(EOS, "A"))},
    "a template without one": {
        "tokenizer.json": tokenizer_json(post_processor=template("A")),
        "tokenizer_config.json": {"add_bos_token": True},
    },
}
TEXTS = [
    "",
    " ",
    "To be",
    f"To be{EOS}To be",
    "dignums dignums,dignumsdignums  dignums  To",
    "<speaker1> To be<speaker1>  \n dignums\t",
    "<s>To  <s>  be</s>  [PAD]\u00a0 <s>\n",
    " be be, ber berer T beer Tober be",
    "dignumsTo bedignumsTo _dignums dignums_ \u0301dignums\u0301 be\u200d be",
    "né à éééné à éé Ġbe é",
]


def write_case(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the files of a case."""
    if "tokenizer.json" not in files:
        (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
        files = files | {"vocab.json": VOCABULARY}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")


def transformers_finds(files: dict[str, dict[str, Any]], texts: list[str]) -> dict[str, Any]:
    """Return the ids of the texts, and those of the tokens that begin and end a text."""
    from transformers import GPT2Tokenizer

    with tempfile.TemporaryDirectory() as name:
        write_case(Path(name), files)
        tokenizer = GPT2Tokenizer.from_pretrained(name)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {"ids": ids, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}


def goldens() -> dict[str, Any]:
    """Return what is found in every case."""
    return {name: transformers_finds(files, TEXTS) for name, files in CASES.items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(goldens(), separators=(",", ":")) + "\n", encoding="utf-8")
