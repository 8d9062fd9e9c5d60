"""A packed copy of the weights beside a model's files, which a start maps in place of packing them again."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_xp.atomic_files import written_aside
from gpt_xp.checkpoint.safetensors_file import n_bytes, open_safetensors, write_safetensors
from gpt_xp.errors import CheckpointError, GptXpWarning
from gpt_xp.quantization import GROUP, Quantized, kind_of
from gpt_xp.types import Params
from gpt_xp_backends.native_backend.packed import PackedTable, PackedWeight

VERSION = "1"  # Change it when panels lie in memory in another order.
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8"}


def copy_path(folder: Path, params: Params, dtype: str, columns: int) -> Path:
    """Return the file for these params, on processors whose panels have so many columns."""
    wte = params["wte"]
    return folder / f".packed-{kind_of(wte) if isinstance(wte, Quantized) else dtype}-{columns}"


def write_copy(path: Path, packed: Params, made_from: str) -> None:
    """Write the packed weights of `packed`. `made_from` is the stamp of the folder before they were read.

    Raises `CheckpointError` where that fails, or the weights in the folder have changed since.
    """
    arrays = {}
    for name, weight in _weights(packed):
        stored = weight.weight if isinstance(weight, PackedTable) else weight
        arrays[f"{name}.panels"] = stored.panels
        arrays |= {} if stored.scales is None else {f"{name}.scales": stored.scales}
    tensors = {name: (_DTYPES[str(array.dtype)], array.shape) for name, array in arrays.items()}
    total = sum(n_bytes(*each) for each in tensors.values())
    with written_aside(path, total) as aside:
        write_safetensors(aside, tensors, lambda name: arrays[name].data, {"made from": made_from})
        if stamp(path.parent) != made_from:
            raise CheckpointError(f"the weights in {path.parent} changed while they were packed: pack them again")


def read_copy(path: Path, params: Params, kind: str, columns: int) -> dict[int, tuple[Any, PackedWeight]]:
    """Return each weight of `params` with its packed form, by the weight's id; none without a copy of these weights."""
    if not path.exists():
        return {}
    try:
        with open_safetensors(str(path)) as file:
            if file.metadata.get("made from") != stamp(path.parent):
                raise CheckpointError(f"{path} is a packed copy of other weights")
            return {
                id(weight): (weight, _packed(file, name, weight, kind, columns)) for name, weight in _weights(params)
            }
    except (CheckpointError, OSError) as error:
        warnings.warn(
            f"{error}; the weights are packed again: `gpt-xp models pack` writes a new copy", GptXpWarning, stacklevel=2
        )
        return {}


def _packed(file: Any, name: str, weight: Any, dtype: str, columns: int) -> PackedWeight:
    kind = kind_of(weight) if isinstance(weight, Quantized) else dtype
    n_in, n_out = weight.shape[::-1] if name == "wte" else weight.shape
    n_panels = -(-n_out // columns)
    rows, stored = (n_in // 2, "U8") if kind == "int4" else (n_in, _DTYPES[kind])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"panels": (stored, (n_panels, rows, columns))}
    if kind == "int8":
        expected["scales"] = "F32", (n_panels * columns,)
    if kind == "int4":
        expected["scales"] = "F32", (n_panels, n_in // GROUP, columns)
    for part, tensor in expected.items():
        found = file.tensors.get(f"{name}.{part}")
        if found is None or (found.dtype, found.shape) != tensor:
            raise CheckpointError(f"{file.path} has no {name}.{part} that fits the model")
    arrays = {part: file.read(f"{name}.{part}") for part in expected}
    return PackedWeight(kind, (n_in, n_out), arrays["panels"], arrays.get("scales"))


def _weights(params: Params) -> Iterator[tuple[str, Any]]:
    yield "wte", params["wte"]
    for number, block in enumerate(params["blocks"]):
        for part in ("attn", "mlp"):
            for name, layer in block[part].items():
                yield f"{number}.{part}.{name}", layer["w"]


def stamp(folder: Path) -> str:
    """Return the version, and the names, sizes and times of the files of weights in a folder."""
    files = sorted(path for end in ("", ".index.json") for path in folder.glob(f"*.safetensors{end}"))
    found = [(path.name, status.st_size, status.st_mtime_ns) for path in files if (status := os.stat(path))]
    return json.dumps([VERSION, found])
