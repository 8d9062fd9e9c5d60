"""Write a look as one HTML page that needs no network: the numbers, compressed, and a script that draws them.

The files of the script are ES modules. They are put together into one, because a page that is opened from a file cannot
import others. A Content-Security-Policy in the page forbids everything that would use the network.
"""

import base64
import html
import json
import re
import zlib
from importlib import resources
from typing import Any

import numpy as np

from gpt_xp.comparison.figures import layer_names
from gpt_xp.inspection.results import Look
from gpt_xp.types import NumpyArray

SCRIPTS = ("data.js", "sampling.js", "dom.js", "color.js", "tokens.js", "next.js", "lens.js", "attention.js",
           "distances.js", "main.js")  # fmt: skip
EMPTY_SIZE = 50_000  # A page without numbers has more bytes than this.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
# What the one script does not need: imports, the word `export`, and lines of comments.
LINE_OF_A_MODULE = re.compile(r"^import .*\n|^export (?=function|const|class|async)|^ *(//|/?\*).*\n", re.MULTILINE)


def page(look: Look, server: bool = False) -> str:
    """Return the page. With `server`, it asks the server that it came from for other prompts and exact numbers."""
    policy = POLICY + ("; connect-src 'self'" if server else "")
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{look.model}: gpt-xp look"),
        "SERVER": "true" if server else "false",
        "STYLE": _file("page.css"),
        "SCRIPT": "".join(LINE_OF_A_MODULE.sub("", _file(name)) for name in SCRIPTS),
        "DATA": base64.b64encode(pack(look)).decode("ascii"),
    }
    return re.sub(r"@(POLICY|TITLE|SERVER|STYLE|SCRIPT|DATA)@", lambda found: parts[found[1]], _file("page.html"))


def pack(look: Look) -> bytes:
    """Return the numbers and texts of a look, compressed by zlib.

    The content is the length of a JSON header (4 bytes, the lowest first), the header, and the arrays. The header has
    the texts, and the dtype, shape and place of each array. Of an array, the lowest byte of each number comes first,
    then the next of each: bytes that are alike compress better together.
    """
    places, body = {}, bytearray()
    for name, array in _arrays(look).items():
        places[name] = {"dtype": array.dtype.name, "shape": array.shape, "at": len(body)}
        numbers = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
        body += numbers.reshape(-1, 1).view(np.uint8).T.tobytes()
    header = json.dumps({**_texts(look), "arrays": places}).encode()
    return zlib.compress(len(header).to_bytes(4, "little") + header + bytes(body), 9)


def id_dtype(n_vocab: int) -> str:
    """Return the dtype of token ids, and of numbers of tokens, in a page."""
    return "uint16" if n_vocab < 2**16 else "int32"


def _file(name: str) -> str:
    return (resources.files("gpt_xp.inspection") / "page_files" / name).read_text(encoding="utf-8")


def _texts(look: Look) -> dict[str, Any]:
    return {
        "model": look.model,
        "prompt": look.prompt,
        "config": {name: getattr(look.config, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")},
        "layers": [*layer_names(look.config.n_layer), "logits"],
        "position": look.predictions.position,
        "lensFirst": look.lens.first,
        "attention": {"kind": look.attention.kind, "square": look.attention.square},
        "distances": [
            {
                "backend": each.backend, "dtype": each.dtype, "version": each.version, "device": each.device,
                "settings": each.settings, "problems": each.problems, "ran": each.relative is not None,
            }
            for each in look.distances
        ],
        "leftOut": look.left_out,
        "madeBy": look.made_by,
    }  # fmt: skip


def _arrays(look: Look) -> dict[str, NumpyArray]:
    predictions, lens, attention = look.predictions, look.lens, look.attention
    spellings, ids = list(look.vocabulary.values()), id_dtype(look.config.n_vocab)
    arrays: dict[str, Any] = {
        "tokens": np.array(look.token_ids, np.int32),
        "vocabularyIds": np.array(list(look.vocabulary), np.int32),
        "vocabularyEnds": np.cumsum([len(each) for each in spellings], dtype=np.int32),
        "vocabularyBytes": np.frombuffer(b"".join(spellings), np.uint8),
        "surprise": look.surprise,
        "topIds": predictions.ids.astype(ids),
        "topLogits": predictions.logits,
        "restCounts": predictions.counts.astype(ids),
        "restLevels": predictions.levels,
        "allLogits": predictions.all_logits,
        "lensIds": lens.ids.astype(ids),
        "lensLogprobs": lens.logprobs,
        "lensFinal": lens.final,
        "weights": attention.weights,
        "last": attention.last,
    }
    for number, each in enumerate(look.distances):
        if each.relative is not None:
            arrays[f"relative{number}"] = each.relative
            arrays[f"allowed{number}"] = each.allowed
            arrays[f"same{number}"] = np.asarray(each.is_same).astype(np.uint8)
            arrays[f"margins{number}"] = each.margins
    return {name: np.asarray(array) for name, array in arrays.items()}
