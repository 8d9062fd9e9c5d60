"""The files of a tokenizer: `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe`, or `tokenizer.json`.

Each of the two readers returns the arguments of `Tokenizer`; they raise `TokenizerError`, with file and line or field.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_xp.errors import TokenizerError
from gpt_xp.safetensors_file import lfs_problem

TOKENIZER_JSON, ADDED_TOKENS, VOCAB, MERGES = "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"
PAIRS = ((VOCAB, MERGES), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, OpenAI's names

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
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": ("ByteLevel", "TemplateProcessing", None),
    "post_processor.special_tokens": ({}, None),  # a template that has some adds them to each text
    "decoder.type": ("ByteLevel", None),
}


class Places(NamedTuple):
    """How error messages name the vocabulary, and merge number i."""

    vocabulary: str
    merge: Callable[[int], str]


IN_MEMORY = Places("encoder", "merges[{}]".format)
Parts = tuple[dict[str, int], Iterable[tuple[str, str]], Iterable[str], Places]


def what_is_missing(folder: Path) -> str:
    """Return the message for a folder in which no form is complete."""
    if not folder.is_dir():
        return f"{folder} is not a directory: expected one with the files of a tokenizer"
    for pair in PAIRS:
        for here, missing in (pair, pair[::-1]):
            if (folder / here).exists():
                return f"{folder} has {here} but not {missing}: the two belong together"
    pairs = " or ".join(" + ".join(pair) for pair in PAIRS)
    return f"{folder} has no tokenizer: looked for {TOKENIZER_JSON} or {pairs}"


def read_pair(vocab: Path, merges: Path) -> Parts:
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
    return encoder, _pairs(lines[first:], places), added, places


def read_tokenizer_json(path: Path) -> Parts:
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
    added = dict(_added_token(entry, f"{path}: added_tokens[{i}]") for i, entry in enumerate(document["added_tokens"]))
    encoder = _with_added(document["model"]["vocab"], added, f"{path}: added_tokens")
    places = Places(f"{path}: model.vocab", lambda rank: f"{path}: model.merges[{rank}]")
    return encoder, _pairs(document["model"]["merges"], places), added, places


def _field(document: Any, field: str) -> Any:
    for name in field.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _added_token(entry: Any, place: str) -> tuple[str, int]:
    for option in ("single_word", "lstrip", "rstrip"):  # they change which characters around a token it takes
        if _field(entry, option):
            raise TokenizerError(f"{place}.{option} is {json.dumps(entry[option])}, expected false")
    match entry:
        case {"content": str(content), "id": int(id)}:
            return content, id
    raise TokenizerError(f"{place} has no content (a string) or no id (an integer)")


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


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if problem := lfs_problem(content, path):
            raise TokenizerError(problem)
        return content.decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TokenizerError(f"{path}, line {line}: not UTF-8: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError, and says the line
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object but a {type(value).__name__}")
    return value


def write_all(folder: Path, files: dict[str, str]) -> None:
    """Writes `files` under temporary names, then renames all: a failure leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for path, temporary in staged.items():
            temporary.write_bytes(files[path.name].encode())
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
