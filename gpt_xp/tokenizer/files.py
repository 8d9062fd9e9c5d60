"""The files of a tokenizer: `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe`, or `tokenizer.json`.

Beside them stand `added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json`. They say which tokens were
added, which roles those have, and what encoding adds to a text, and mean what they mean to transformers' GPT2Tokenizer.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt_xp import json_text
from gpt_xp.checkpoint.safetensors_file import lfs_problem
from gpt_xp.errors import JsonError, TokenizerError
from gpt_xp.tokenizer.added_tokens import AddedToken

TOKENIZER_JSON, ADDED_TOKENS, VOCAB, MERGES = "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"
TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
PAIRS = ((VOCAB, MERGES), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, OpenAI's names
STATEMENTS = (TOKENIZER_JSON, ADDED_TOKENS, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)  # all that is not the pair

# What a tokenizer.json must say to be GPT-2's; None stands for null and for a field that is not there.
GPT2_FIELDS: dict[str, tuple[Any, ...]] = {
    "model.type": ("BPE", None),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": ("", None),
    "model.end_of_word_suffix": ("", None),
    "model.byte_fallback": (False, None),
    "model.ignore_merges": (False, None),
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False, True, None),
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": ("ByteLevel", "TemplateProcessing", None),
    "decoder.type": ("ByteLevel", None),
}


class Places(NamedTuple):
    """How error messages name the vocabulary, and merge number i."""

    vocabulary: str
    merge: Callable[[int], str]


IN_MEMORY = Places("encoder", "merges[{}]".format)


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Parts:
    """All that the files of a tokenizer say; `files` holds those beside the pair as they are."""

    encoder: dict[str, int]
    merges: Iterable[tuple[str, str]]
    places: Places
    added_tokens: tuple[AddedToken, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos_token: bool = False
    add_prefix_space: bool = False
    files: tuple[tuple[str, bytes], ...] = ()


def read_parts(folder: Path) -> Parts:
    """Read the tokenizer in a folder. Raises `TokenizerError`, with file and line or field."""
    settings = _read_if_there(folder / TOKENIZER_CONFIG)
    if (folder / TOKENIZER_JSON).exists():
        parts = _read_tokenizer_json(folder / TOKENIZER_JSON)
    else:
        pair = next((each for each in PAIRS if all((folder / name).exists() for name in each)), None)
        if pair is None:
            raise TokenizerError(_what_is_missing(folder))
        parts = _read_pair(folder / pair[0], folder / pair[1], bool(settings.get("add_bos_token")))
    # A list of added tokens in tokenizer_config.json is complete: transformers then leaves the older file alone.
    roles = settings if "added_tokens_decoder" in settings else settings | _read_if_there(folder / SPECIAL_TOKENS_MAP)
    if settings.get("add_eos_token"):
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG}: add_eos_token is true, and would end each prompt: remove it"
        )
    encoder, added = _with_roles(parts, settings, roles, folder)
    return replace(
        parts,
        encoder=encoder,
        added_tokens=tuple(added.values()),
        bos_token=parts.bos_token or _content(roles.get("bos_token")),
        eos_token=_content(roles.get("eos_token")),
        add_prefix_space=bool(settings.get("add_prefix_space", parts.add_prefix_space)),
        files=tuple((name, (folder / name).read_bytes()) for name in STATEMENTS if (folder / name).exists()),
    )


def _what_is_missing(folder: Path) -> str:
    """Return the message for a folder in which no form is complete."""
    if not folder.is_dir():
        return f"{folder} is not a directory: expected one with the files of a tokenizer"
    for pair in PAIRS:
        for here, missing in (pair, pair[::-1]):
            if (folder / here).exists():
                return f"{folder} has {here} but not {missing}: the two belong together"
    pairs = " or ".join(" + ".join(pair) for pair in PAIRS)
    return f"{folder} has no tokenizer: looked for {TOKENIZER_JSON} or {pairs}"


def _read_pair(vocab: Path, merges: Path, add_bos_token: bool) -> Parts:
    """Read a vocabulary and its merges, with the `added_tokens.json` that may lie beside Hugging Face's pair."""
    encoder, added = _read_object(vocab), {}
    if vocab.name == VOCAB and (extra := vocab.with_name(ADDED_TOKENS)).exists():
        added = _read_object(extra)
        encoder = _with_added(encoder, added, str(extra))
    # Not splitlines, which also cuts at U+0085 and others. Windows may have put \r before \n: in a token, that
    # byte is written 'č'.
    lines = [line.removesuffix("\r") for line in _read_text(merges).rstrip("\r\n").split("\n")]
    first = int(lines[0].startswith("#version"))  # further down it is a merge
    places = Places(str(vocab), lambda rank: f"{merges}, line {first + rank + 1}")
    # The file says no more than the ids; those that have a role are made special by it.
    tokens = tuple(AddedToken(content, special=False, normalized=True) for content in added)
    return Parts(encoder, _pairs(lines[first:], places), places, tokens, add_bos_token=add_bos_token)


def _read_tokenizer_json(path: Path) -> Parts:
    """Read a `tokenizer.json`, refused unless all that it says is GPT-2's byte-level BPE."""
    document = _read_object(path)
    for field, expected in GPT2_FIELDS.items():
        if (value := _field(document, field)) not in expected:
            raise TokenizerError(
                f"{path}: not GPT-2's byte-level BPE: {field} is {json.dumps(value)}, expected "
                f"{json.dumps(expected[0])}"
            )
    for field, kind in (("model.vocab", dict), ("model.merges", list), ("added_tokens", list)):
        if not isinstance(_field(document, field), kind):
            raise TokenizerError(f"{path}: {field} is not a {kind.__name__}")
    added: dict[str, int] = {}
    tokens = []
    for index, entry in enumerate(document["added_tokens"]):
        place = f"{path}: added_tokens[{index}]"
        token = _added_token(entry, place)
        if type(entry.get("id")) is not int:
            raise TokenizerError(f"{place} has no id (an integer)")
        tokens.append(token)
        added[token.content] = entry["id"]
    encoder = _with_added(document["model"]["vocab"], added, f"{path}: added_tokens")
    places = Places(f"{path}: model.vocab", lambda rank: f"{path}: model.merges[{rank}]")
    bos_token = _template_begin(document, path)
    return Parts(
        encoder,
        _pairs(document["model"]["merges"], places),
        places,
        tuple(tokens),
        bos_token=bos_token,
        add_bos_token=bos_token is not None,
        add_prefix_space=bool(_field(document, "pre_tokenizer.add_prefix_space")),
    )


def _template_begin(document: dict[str, Any], path: Path) -> str | None:
    """Return the token that a template puts before each text; None if it adds nothing."""
    if _field(document, "post_processor.type") != "TemplateProcessing":
        return None
    match _field(document, "post_processor.single"):
        case [{"Sequence": {"id": "A"}}]:
            return None
        case [{"SpecialToken": {"id": str(token)}}, {"Sequence": {"id": "A"}}]:
            return token
        case template:
            raise TokenizerError(
                f"{path}: not GPT-2's byte-level BPE: post_processor.single is {json.dumps(template):.200}, expected "
                "the text alone, or one token before it"
            )


def _with_roles(
    parts: Parts, settings: dict[str, Any], roles: dict[str, Any], folder: Path
) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """Return the vocabulary and the added tokens with what the files beside them say of both."""
    encoder, added = parts.encoder, {token.content: token for token in parts.added_tokens}
    listed = settings.get("added_tokens_decoder", {})
    place = f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder"
    if not isinstance(listed, dict) or not all(id.isdecimal() and len(id) < 20 for id in listed):
        raise TokenizerError(f"{place} is not an object from ids to tokens")
    for id, entry in listed.items():
        token = _added_token(entry, f"{place}[{id}]")
        encoder = _with_added(encoder, {token.content: int(id)}, place)
        added[token.content] = token
    for token in _tokens_with_a_role(roles):
        added[token.content] = replace(added.get(token.content, token), special=True)
        if token.content not in encoder:
            encoder = encoder | {token.content: max(encoder.values(), default=-1) + 1}  # as transformers counts on
    return encoder, added


def _tokens_with_a_role(entries: dict[str, Any]) -> Iterator[AddedToken]:
    """Yield the tokens that "bos_token", "pad_token" and the like name; there may be others than transformers' own."""
    for key, value in entries.items():
        several = value if key in ("additional_special_tokens", "extra_special_tokens") else [value]
        if not key.endswith(("_token", "_special_tokens")) or several is None:
            continue
        for each in several.values() if isinstance(several, dict) else several:
            if isinstance(each, dict):
                yield replace(_added_token(each, key), special=True)
            elif isinstance(each, str) and each:
                yield AddedToken(each)


def _content(entry: Any) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) and content else None


def _field(document: Any, field: str) -> Any:
    for name in field.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _added_token(entry: Any, place: str) -> AddedToken:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise TokenizerError(f"{place} has no content (a string)")
    flags = {flag: entry.get(flag, False) for flag in FLAGS}
    for flag, value in flags.items():
        if type(value) is not bool:
            raise TokenizerError(f"{place}.{flag} is {json.dumps(value)}, expected true or false")
    return AddedToken(entry["content"], **flags)


def _with_added(encoder: dict[str, int], added: dict[str, int], place: str) -> dict[str, int]:
    for token, id in added.items():
        if encoder.get(token, id) != id:
            raise TokenizerError(f"{place}: {token!r} is {id!r}, but {encoder[token]!r} in the vocabulary")
    return encoder | added if added else encoder


def _pairs(merges: Iterable[Any], places: Places) -> Iterator[tuple[str, str]]:
    """The two parts of each merge, which is "left right" or ["left", "right"]."""
    for rank, merge in enumerate(merges):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [left, right] if left and right and isinstance(left, str) and isinstance(right, str):
                yield left, right
            case _:
                problem = f"{merge!r} is no merge: expected two tokens with one space between them"
                raise TokenizerError(f"{places.merge(rank)}: {problem}")


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.exists() else {}


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if problem := lfs_problem(content, path):
            raise TokenizerError(problem)
        return content.decode("utf-8").removeprefix("\ufeff")  # a byte order mark, which editors on Windows write
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TokenizerError(f"{path}, line {line}: not UTF-8: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json_text.parse(_read_text(path))
    except JsonError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object but a {type(value).__name__}")
    return value


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Writes `files` under temporary names, then renames all: a failure leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for path, temporary in staged.items():
            temporary.write_bytes(files[path.name])
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
