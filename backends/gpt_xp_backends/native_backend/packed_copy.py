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
from gpt_xp.quantization import Quantized, kind_of
from gpt_xp.types import Params
from gpt_xp_backends.native_backend.packed import PackedTable, PackedWeight

VERSION = "1"  # of the order in which panels lie
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8"}


def copy_path(folder: Path, params: Params, dtype: str, columns: int) -> Path:
    """Return the file for these params, on processors whose panels have so many columns."""
    wte = params["wte"]
    return folder / f".packed-{kind_of(wte) if isinstance(wte, Quantized) else dtype}-{columns}"


def write_copy(path: Path, packed: Params) -> None:
    """Write the packed weights of `packed`. Raises `CheckpointError` where that fails."""
    arrays = {}
    for name, weight in _weights(packed):
        stored = weight.weight if isinstance(weight, PackedTable) else weight
        arrays[f"{name}.panels"] = stored.panels
        arrays |= {} if stored.scales is None else {f"{name}.scales": stored.scales}
    tensors = {name: (_DTYPES[str(array.dtype)], array.shape) for name, array in arrays.items()}
    total = sum(n_bytes(*each) for each in tensors.values())
    with written_aside(path, total) as aside:
        write_safetensors(aside, tensors, lambda name: arrays[name].data, {"made from": _stamp(path.parent)})


def read_copy(path: Path, params: Params, kind: str, columns: int) -> dict[int, tuple[Any, PackedWeight]]:
    """Return each weight of `params` with its packed form, by the weight's id; none without a copy of these weights."""
    if not path.exists():
        return {}
    try:
        with open_safetensors(str(path)) as file:
            if file.metadata.get("made from") != _stamp(path.parent):
                raise CheckpointError(f"{path} is a packed copy of other weights")
            return {
                id(weight): (weight, _packed(file, name, weight, kind, columns)) for name, weight in _weights(params)
            }
    except (CheckpointError, KeyError, OSError) as error:
        warnings.warn(
            f"{error}; the weights are packed again: `gpt-xp models pack` writes a new copy", GptXpWarning, stacklevel=2
        )
        return {}


def _packed(file: Any, name: str, weight: Any, kind: str, columns: int) -> PackedWeight:
    kind = kind_of(weight) if isinstance(weight, Quantized) else kind
    shape = weight.shape[::-1] if name == "wte" else weight.shape
    panels = file.read(f"{name}.panels")
    scales = file.read(f"{name}.scales") if f"{name}.scales" in file.tensors else None
    rows = shape[0] // 2 if kind == "int4" else shape[0]
    if panels.shape != (-(-shape[1] // columns), rows, columns):
        raise CheckpointError(f"{file.path} has a {name} of another shape")
    return PackedWeight(kind, shape, panels, scales)


def _weights(params: Params) -> Iterator[tuple[str, Any]]:
    yield "wte", params["wte"]
    for number, block in enumerate(params["blocks"]):
        for part in ("attn", "mlp"):
            for name, layer in block[part].items():
                yield f"{number}.{part}.{name}", layer["w"]


def _stamp(folder: Path) -> str:
    """Return the version, and the names, sizes and times of the files of weights in a folder."""
    files = sorted(path for path in folder.glob("model*.safetensors"))
    found = [(path.name, status.st_size, status.st_mtime_ns) for path in files if (status := os.stat(path))]
    return json.dumps([VERSION, found])
