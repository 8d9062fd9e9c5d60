"""Small models in place of the published ones: their files, as on the Hub and in the bucket, and their pins.

`command(...)` returns a command that runs gpt-xp with them in a new process.
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai_files
from checkpoint_files import config_entries, file_bytes
from folders import GOLDEN_FILES
from servers import BucketServer, HubServer

from gpt_xp.hub import published
from gpt_xp.hub.published import Pin, Published

CONFIG = openai_files.CONFIG
HEADER = 2 * 1511  # bytes; even, but not a multiple of 4, so no float32 tensor can be mapped
GOLDEN = GOLDEN_FILES / "openai"  # the same model as TensorFlow wrote it


def hub_files(seed: int = 0) -> dict[str, bytes]:
    """Return the four files of a small model. Its weights are like the published ones: misaligned, with masks."""
    tensors = openai_files.make_tensors(seed=seed)
    tensors |= {f"h.{i}.attn.bias": np.tri(CONFIG.n_ctx, dtype=np.float32)[None, None] for i in range(CONFIG.n_layer)}
    encoder = (GOLDEN / "encoder.json").read_bytes()
    return {
        "config.json": json.dumps(config_entries(CONFIG)).encode(),
        "vocab.json": encoder,
        "merges.txt": (GOLDEN / "vocab.bpe").read_bytes(),
        "model.safetensors": file_bytes(tensors, header_length=HEADER),
    }


def openai_layout() -> dict[str, bytes]:
    """Return the seven files of the golden checkpoint."""
    return {path.name: path.read_bytes() for path in GOLDEN.iterdir()}


def small(name: str, seed: int = 0) -> Published:
    """Return the published model of that name, with the size and pins of a small one."""
    weights = hub_files(seed)["model.safetensors"]
    data = (GOLDEN / published.OPENAI_WEIGHTS).read_bytes()
    return dataclasses.replace(
        published.MODELS[name],
        config=dataclasses.replace(CONFIG, eos_token_id=50256),
        weights=Pin(len(weights), f"sha256:{hashlib.sha256(weights).hexdigest()}"),
        openai_weights=Pin(len(data), f"md5:{hashlib.md5(data).hexdigest()}"),
    )


def vocabulary_pins() -> dict[str, Pin]:
    files = hub_files()
    return {
        name: Pin(len(files[name]), f"sha256:{hashlib.sha256(files[name]).hexdigest()}")
        for name in ("vocab.json", "merges.txt")
    }


def on_hub(server: HubServer, model: Published, seed: int = 0) -> dict[str, str]:
    """Put the model on the server; return the path of each file."""
    paths = {name: f"/{model.repo}/resolve/{model.revision}/{name}" for name in hub_files(seed)}
    server.files |= {paths[name]: content for name, content in hub_files(seed).items()}
    return paths


def path_of(file: str) -> str:
    """Return the path of a file of 124M on the Hub."""
    model = published.MODELS["124M"]
    return f"/{model.repo}/resolve/{model.revision}/{file}"


def in_bucket(server: BucketServer, name: str) -> dict[str, str]:
    paths = {file: f"/gpt-2/models/{name}/{file}" for file in openai_layout()}
    server.files |= {paths[file]: content for file, content in openai_layout().items()}
    return paths


def install(patch: Any, *names: str, bucket: str | None = None) -> None:
    """Replace published models by small ones, with a `pytest.MonkeyPatch`."""
    for name in names:
        patch.setitem(published.MODELS, name, small(name))
    patch.setattr(published, "_VOCABULARY", vocabulary_pins())
    if bucket is not None:
        patch.setattr(published, "BUCKET", f"{bucket}/gpt-2/models")


def command(*names: str, bucket: str | None = None, before: str = "") -> list[str]:
    """Return a command that runs gpt-xp with small models in a new process; `before` is Python code to run first."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytest, small_published
from gpt_xp.hub import download
small_published.install(pytest.MonkeyPatch(), *{names!r}, bucket={bucket!r})
download.FIRST_WAIT = 0.01
{before}
from gpt_xp.cli import main
main()
"""
    return [sys.executable, "-c", code]


TENSORS = openai_files.make_tensors()
WEIGHTS = "model.safetensors"


def snapshot(model: Published, repo: str | None = None) -> Path:
    """Make and return the folder in which huggingface_hub stores a model."""
    name = (repo or model.repo).replace("/", "--")
    folder = Path(os.environ["HF_HOME"], "hub", f"models--{name}", "snapshots", model.revision)
    folder.mkdir(parents=True)
    return folder


def fill(folder: Path, *names: str) -> None:
    """Write files as huggingface_hub does: blobs, and links to them."""
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for name, content in hub_files().items():
        if not names or name in names:
            (blobs / name).write_bytes(content)
            (folder / name).symlink_to(Path("..", "..", "blobs", name))
