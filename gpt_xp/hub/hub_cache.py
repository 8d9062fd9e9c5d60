"""Find models in the Hub's cache on this machine, where huggingface_hub and transformers keep their files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gpt_xp.hub.digests import digest_of
from gpt_xp.hub.published import CONFIG, WEIGHTS, Published


def complete_snapshots(model: Published) -> list[Path]:
    """Return the folders that hold all files of `model`, as far as their names and the size of the weights tell."""
    return [folder for folder in _snapshots(model) if _is_complete(model, folder)]


def find_file(model: Published, file: str) -> Path | None:
    """Return the path of a file of `model`, verified where its digest is known; None where it is not there."""
    pin = model.pin(file).digest
    for path in (folder / file for folder in _snapshots(model)):
        with contextlib.suppress(OSError):  # The file is absent or unreadable.
            digest = digest_of(path)
            if pin in (None, digest):
                return path
    return None


def _snapshots(model: Published) -> Iterator[Path]:
    """Yield where huggingface_hub keeps this revision: by the full name of the repository, or by its old short one."""
    named = os.environ.get("HF_HUB_CACHE")
    if named is None:
        xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        named = os.path.join(os.environ.get("HF_HOME", os.path.join(xdg, "huggingface")), "hub")
    for repo in (model.repo, model.repo.rpartition("/")[2]):
        folder = os.path.expanduser(os.path.expandvars(named))
        if folder.startswith("~"):  # There is no home directory.
            return
        yield Path(folder, f"models--{repo.replace('/', '--')}", "snapshots", model.revision)


def _is_complete(model: Published, folder: Path) -> bool:
    def has(*files: str) -> bool:
        return all(os.path.exists(folder / file) for file in files)

    if not (has(CONFIG, WEIGHTS) and (has("tokenizer.json") or has("vocab.json", "merges.txt"))):
        return False
    return model.weights.n_bytes in (None, os.path.getsize(folder / WEIGHTS))
