"""Read and write a tokenizer's files: `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe`, or `tokenizer.json`.

`added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json` may be beside them. They say which tokens
were added, which roles these have, and what encoding adds to a text. transformers' GPT2Tokenizer reads them so.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt_xp import json_text
from gpt_xp.checked_files import lfs_problem
from gpt_xp.errors import JsonError, TokenizerError
from gpt_xp.tokenizer.added_tokens import AddedToken
from gpt_xp.tokenizer.words import EOS

TOKENIZER_JSON, ADDED_TOKENS, VOCAB, MERGES = "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"
TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
PAIRS = ((VOCAB, MERGES), ("encoder.json", "vocab.bpe"))  # These are Hugging Face's and OpenAI's names.
SIDE_FILES = (TOKENIZER_JSON, ADDED_TOKENS, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)  # These are all but the pair.

# GPT-2's tokenizer.json has these values in its fields. None stands for null and for an absent field.
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


class SourceNames(NamedTuple):
    """The names that error messages give to the vocabulary, and to merge number i."""

    vocabulary: str
    merge: Callable[[int], str]


IN_MEMORY = SourceNames("encoder", "merges[{}]".format)
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that the files of a tokenizer say; `files` holds the side files as they are."""

    encoder: dict[str, int]
    merges: Iterable[tuple[str, str]]
    source_names: SourceNames
    added_tokens: tuple[AddedToken, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos_token: bool = False
    add_prefix_space: bool = False
    files: tuple[tuple[str, bytes], ...] = ()


def read_spec(folder: Path) -> TokenizerSpec:
    """Read the tokenizer in a folder. Raises `TokenizerError`, with file and line or field."""
    settings = _read_if_there(folder / TOKENIZER_CONFIG)
    if (folder / TOKENIZER_JSON).exists():
        spec = _read_tokenizer_json(folder / TOKENIZER_JSON)
    else:
        pair = next((each for each in PAIRS if all((folder / name).exists() for name in each)), None)
        if pair is None:
            raise TokenizerError(_what_is_missing(folder))
        spec = _read_pair(folder / pair[0], folder / pair[1], bool(settings.get("add_bos_token")))
    # A list of added tokens in tokenizer_config.json is complete. transformers then ignores the older file.
    roles = settings if "added_tokens_decoder" in settings else settings | _read_if_there(folder / SPECIAL_TOKENS_MAP)
    if settings.get("add_eos_token"):
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG}: add_eos_token is true, and would end each prompt: remove it"
        )
    encoder, added = _with_roles(spec, settings, roles, folder)
    return replace(
        spec,
        encoder=encoder,
        added_tokens=tuple(added.values()),
        bos_token=spec.bos_token or _content(roles.get("bos_token")),
        eos_token=_content(roles.get("eos_token")),
        add_prefix_space=bool(settings.get("add_prefix_space", spec.add_prefix_space)),
        files=tuple((name, (folder / name).read_bytes()) for name in SIDE_FILES if (folder / name).exists()),
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


def _read_pair(vocab: Path, merges: Path, add_bos_token: bool) -> TokenizerSpec:
    """Read a vocabulary and its merges, with the `added_tokens.json` that may lie beside Hugging Face's pair."""
    encoder, added = _read_object(vocab), {}
    if vocab.name == VOCAB and (extra := vocab.with_name(ADDED_TOKENS)).exists():
        added = _read_object(extra)
        encoder = _with_added(encoder, added, str(extra))
    # splitlines would also cut at U+0085 and others. Windows may have put \r before \n. It belongs to no token,
    # because a token has 'č' for that byte.
    lines = [line.removesuffix("\r") for line in _read_text(merges).rstrip("\r\n").split("\n")]
    first = int(lines[0].startswith("#version"))  # In a later line it is a merge.
    names = SourceNames(str(vocab), lambda rank: f"{merges}, line {first + rank + 1}")
    # The file has only the ids. A role makes a token special later.
    tokens = tuple(AddedToken(content, special=False, normalized=True) for content in added)
    return TokenizerSpec(encoder, _pairs(lines[first:], names), names, tokens, add_bos_token=add_bos_token)


def _read_tokenizer_json(path: Path) -> TokenizerSpec:
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
    names = SourceNames(f"{path}: model.vocab", lambda rank: f"{path}: model.merges[{rank}]")
    bos_token = _template_begin(document, path)
    return TokenizerSpec(
        encoder,
        _pairs(document["model"]["merges"], names),
        names,
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
    spec: TokenizerSpec, settings: dict[str, Any], roles: dict[str, Any], folder: Path
) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """Return the vocabulary and the added tokens, completed by the files beside them."""
    encoder, added = spec.encoder, {token.content: token for token in spec.added_tokens}
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
            encoder = encoder | {token.content: max(encoder.values(), default=-1) + 1}  # transformers does so too.
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


def _pairs(merges: Iterable[Any], names: SourceNames) -> Iterator[tuple[str, str]]:
    """Yield the two tokens of each merge, which is "left right" or ["left", "right"]."""
    for rank, merge in enumerate(merges):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [left, right] if left and right and isinstance(left, str) and isinstance(right, str):
                yield left, right
            case _:
                problem = f"{merge!r} is no merge: expected two tokens with one space between them"
                raise TokenizerError(f"{names.merge(rank)}: {problem}")


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.exists() else {}


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if problem := lfs_problem(content, path):
            raise TokenizerError(problem)
        return content.decode("utf-8").removeprefix("\ufeff")  # Editors on Windows write a BOM.
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


# --- writing ----------------------------------------------------------------------------------------------------------


def pair_files(encoder: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> dict[str, bytes]:
    """Return the content of `vocab.json`, in the order of the ids, and of `merges.txt`."""
    vocabulary = dict(sorted(encoder.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]
    return {VOCAB: json.dumps(vocabulary, ensure_ascii=False).encode(), MERGES: "".join(lines).encode()}


def side_files(
    added_tokens: Mapping[AddedToken, int],
    bos_token: str | None,
    eos_token: str | None,
    add_bos_token: bool,
    add_prefix_space: bool,
) -> dict[str, bytes]:
    """Return the files that add to `vocab.json` and `merges.txt`; none for GPT-2's tokenizer.

    `added_tokens` maps all added tokens to their ids.
    """
    beside_eos = {token.content: id for token, id in added_tokens.items() if token != AddedToken(EOS)}
    roles = {"bos_token": bos_token, "eos_token": eos_token}
    flags = {"add_bos_token": add_bos_token, "add_prefix_space": add_prefix_space}
    stated: dict[str, Any] = {name: token for name, token in roles.items() if token not in (None, EOS)}
    stated |= {name: flag for name, flag in flags.items() if flag}
    if beside_eos:
        stated["added_tokens_decoder"] = {str(id): asdict(token) for token, id in added_tokens.items()}
    files = {TOKENIZER_CONFIG: stated} if stated else {}
    if beside_eos:  # Some programs read only this file.
        files[ADDED_TOKENS] = beside_eos
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}
