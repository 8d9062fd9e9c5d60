"""Keep the published models on this machine: in gpt-xp's folder, or in the cache of the Hugging Face Hub.

    GPT_XP_HOME/models/124M/hub/       config.json, model.safetensors, vocab.json, merges.txt
    GPT_XP_HOME/models/124M/openai/    OpenAI's seven files, and beside them config.json and model.safetensors

Where GPT_XP_HOME is not set, it is gpt-xp's folder in the user's cache. A file gets its final name only when it is
complete and verified. `gpt-xp.json` records it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gpt_xp.environment import gpt_xp_home, is_offline
from gpt_xp.errors import DownloadError, ModelNotFoundError
from gpt_xp.hub import hub_cache
from gpt_xp.hub.digests import digest_of
from gpt_xp.hub.manifest import Manifest
from gpt_xp.hub.progress import DownloadProgress, StderrProgress
from gpt_xp.hub.published import CONFIG, HUB_FILES, OPENAI_FILES, WEIGHTS, Published

SOURCES = ("hub", "openai")
HUB_CACHE = "the Hub's cache"
_REQUIRED = {"hub": HUB_FILES, "openai": (*OPENAI_FILES, CONFIG, WEIGHTS)}


@dataclass(frozen=True)
class Copy:
    """A copy of a published model; `source` is one of `SOURCES`, or `HUB_CACHE`."""

    source: str
    folder: Path

    @property
    def n_bytes(self) -> int:
        """The size of its files on the disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def copies(model: Published) -> list[Copy]:
    """Return the complete copies of `model` that are here, the one to use first."""
    return [copy for copy in stored(model) if is_whole(copy)]


def stored(model: Published) -> list[Copy]:
    """Return all copies of `model` that are here, also incomplete ones."""
    kept = [Copy(source, folder) for source in SOURCES if (folder := _folder(model, source)) and os.path.exists(folder)]
    return kept + [Copy(HUB_CACHE, folder) for folder in hub_cache.complete_snapshots(model)]


def is_whole(copy: Copy) -> bool:
    """Return whether every file of a copy is here and unchanged, as far as sizes and times tell."""
    return copy.source == HUB_CACHE or _is_whole(copy.folder, copy.source)


def is_begun(folder: Path) -> bool:
    """Return whether the Hub's files are being fetched into the folder, and are not all here yet."""
    return Manifest(folder).knows(CONFIG) and not _is_whole(folder, "hub")


def pull(
    model: Published,
    source: str = "hub",
    folder: Path | None = None,
    progress: DownloadProgress | None = None,
    *,
    offline: bool = False,
) -> Path:
    """Return a folder with `model` from `source` ("hub", "openai"), fetching the files that are not in it.

    The folder is `folder`, or one in `gpt_xp_home()`. OpenAI's files are converted there. Raises `DownloadError`,
    `CheckpointError`, and `ModelNotFoundError` where files are missing and must not be fetched.
    """
    progress = progress or StderrProgress()
    folder = folder or _folder(model, source)
    if folder is not None and _is_whole(folder, source):
        return folder
    if source == "openai":
        from gpt_xp.checkpoint.openai import check_tensorflow

        model.check_in_bucket()
        check_tensorflow()  # Without TensorFlow, fetching would be useless.
    _check_online(model, offline)
    if folder is None:
        raise DownloadError(
            f"{model.name} cannot be kept anywhere: this user has no home directory; set GPT_XP_HOME to a folder"
        )
    with _locked(folder, progress):
        # Another process may have fetched it while this one waited.
        if not _is_whole(folder, source):
            try:
                _fetch(model, source, folder, progress)
            except KeyboardInterrupt:
                progress.note("stopped; what has come is kept, and the next time goes on from there")
                raise
    return folder


def remove(model: Published) -> list[Path]:
    """Remove all that gpt-xp has fetched of `model`, complete or not; return the folders. Raises `DownloadError`."""
    removed = []
    for source in SOURCES:
        folder = _folder(model, source)
        if folder is not None and os.path.lexists(folder):
            with _locked(folder, StderrProgress()):
                shutil.rmtree(folder.resolve())
                if folder.is_symlink():  # It may lead to a larger disk.
                    folder.unlink()
            removed.append(folder)
    return removed


def verifiable(copy: Copy, model: Published) -> list[str]:
    """Return the files of a copy, complete or not, whose digest is known."""
    if copy.source == HUB_CACHE:
        return [file for file in HUB_FILES if model.pin(file).digest and (copy.folder / file).exists()]
    manifest = Manifest(copy.folder)
    return [file for file in _REQUIRED[copy.source] if manifest.knows(file)]


def verify(copy: Copy, model: Published, file: str) -> bool:
    """Hash a file again; return whether it is as it was published, or as it was written here. Raises `OSError`.

    A damaged file in gpt-xp's folder is removed, and fetched again the next time the model is used.
    """
    if copy.source == HUB_CACHE:
        return digest_of(copy.folder / file) == model.pin(file).digest
    manifest = Manifest(copy.folder)
    whole = manifest.holds(file, rehash=True)
    if not whole:
        # In a read-only folder, the file stays.
        with contextlib.suppress(DownloadError), _locked(copy.folder, StderrProgress()):
            Manifest(copy.folder).discard(file)
    return whole


# --- fetching ---------------------------------------------------------------------------------------------------------


def _fetch(model: Published, source: str, folder: Path, progress: DownloadProgress) -> None:
    server = _source_module(source)
    progress.note(f"fetching {model.name} from {server.server_name()} into {folder}")
    _throw_away_damaged(model, folder, source, progress)
    if gpt_xp_home() in folder.parents:
        _sweep(folder)
    server.fetch(model, folder, progress)


def _source_module(source: str) -> ModuleType:
    """Return the module that fetches. It is imported only here, because most models are already on this machine."""
    from gpt_xp.hub import bucket_source, hub_source

    return hub_source if source == "hub" else bucket_source


def _check_online(model: Published, offline: bool) -> None:
    """Raise `ModelNotFoundError` where `model` is not here, and nothing may be fetched."""
    if offline or is_offline():
        raise ModelNotFoundError(
            f"{model.name} is not on this machine, and gpt-xp is offline (--offline, GPT_XP_OFFLINE or "
            f"HF_HUB_OFFLINE): run `gpt-xp models pull {model.name}` with a network, here or where "
            f"{gpt_xp_home() or 'its cache folder'} can be copied from"
        )


def _throw_away_damaged(model: Published, folder: Path, source: str, progress: DownloadProgress) -> None:
    manifest = Manifest(folder)
    for file in _REQUIRED[source]:
        if manifest.knows(file) and not manifest.holds(file):
            progress.note(f"{model.name} {file} is missing or damaged here: it is fetched again")
            manifest.discard(file)


def _sweep(folder: Path) -> None:
    """Remove temporary files of a process that was killed. The .part of a download has another name, and stays."""
    for path in folder.glob("*.part"):
        if re.fullmatch(r".+\.[0-9a-f]{8}\.part", path.name):
            path.unlink()


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(model: Published, source: str) -> Path | None:
    kept = gpt_xp_home()
    return kept and kept / "models" / model.name / source


def _is_whole(folder: Path, source: str) -> bool:
    manifest = Manifest(folder)
    with contextlib.suppress(OSError):
        return all(manifest.holds(file) for file in _REQUIRED[source])
    return False


@contextlib.contextmanager
def _locked(folder: Path, progress: DownloadProgress) -> Iterator[None]:
    """Make `folder`, and let only one process at a time work on it.

    Raises `DownloadError` where the body meets an error of the disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, progress):
            yield
    except (OSError, NotImplementedError) as error:  # filelock raises the second for a disk without locks.
        other = "set GPT_XP_HOME to another folder" if gpt_xp_home() in folder.parents else "name another folder"
        raise DownloadError(
            f"cannot work in {folder} ({error}): check the space and the permissions there, or {other}"
        ) from error


def _lock(folder: Path, progress: DownloadProgress) -> AbstractContextManager[Any]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"another process is working on {folder}; waiting for it")
        return lock.acquire()
