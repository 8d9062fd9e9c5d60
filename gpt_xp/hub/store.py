"""The published models on this machine: in gpt-xp's own cache folder, or in that of the Hugging Face Hub.

    GPT_XP_HOME/models/124M/hub/       config.json, model.safetensors, vocab.json, merges.txt
    GPT_XP_HOME/models/124M/openai/    OpenAI's seven files, and beside them config.json and model.safetensors

GPT_XP_HOME is the user's cache folder for gpt-xp if it is not set. A file stands there under its own name only when it
is whole and verified, and `gpt-xp.json` says so.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt_xp.checkpoint import openai as openai_checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import align_weights
from gpt_xp.config import GPT2Config
from gpt_xp.environment import gpt_xp_home, is_offline
from gpt_xp.errors import DownloadError, ModelNotFoundError
from gpt_xp.hub import published
from gpt_xp.hub.digests import digest_of
from gpt_xp.hub.download import Progress, Remote, download
from gpt_xp.hub.manifest import Manifest
from gpt_xp.hub.progress import StderrProgress
from gpt_xp.hub.published import HUB_FILES, OPENAI_FILES, OPENAI_WEIGHTS, WEIGHTS, Published
from gpt_xp.hub.url_safety import origin

SOURCES = ("hub", "openai")
HUB_CACHE = "the Hub's cache"  # where huggingface_hub and transformers keep what they have fetched
CONFIG = "config.json"
_REQUIRED = {"hub": HUB_FILES, "openai": (*OPENAI_FILES, CONFIG, WEIGHTS)}


@dataclass(frozen=True)
class Copy:
    """A whole copy of a published model; `source` is one of `SOURCES`, or `HUB_CACHE`."""

    source: str
    folder: Path

    @property
    def n_bytes(self) -> int:
        """What its files take on the disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def copies(model: Published) -> list[Copy]:
    """Return the whole copies of `model` that are here, the one to use first."""
    return [copy for copy in stored(model) if is_whole(copy)]


def stored(model: Published) -> list[Copy]:
    """Return what is here of `model`, also copies that are not whole yet, or no more."""
    own = [Copy(source, folder) for source in SOURCES if (folder := _folder(model, source)) and os.path.exists(folder)]
    return own + [Copy(HUB_CACHE, folder) for folder in _snapshots(model) if _is_complete_snapshot(model, folder)]


def is_whole(copy: Copy) -> bool:
    """Whether every file of a copy is here, and as it was verified, as far as sizes and times tell."""
    return copy.source == HUB_CACHE or _is_whole(copy.folder, copy.source)


def is_begun(folder: Path) -> bool:
    """Whether the Hub's files are being fetched into the folder, and are not all here yet."""
    return Manifest(folder).knows(CONFIG) and not _is_whole(folder, "hub")


def pull(
    model: Published,
    source: str = "hub",
    folder: Path | None = None,
    progress: Progress | None = None,
    *,
    offline: bool = False,
) -> Path:
    """Return a folder with `model` from `source` ("hub", "openai"), fetching what is not in it.

    It is one in `gpt_xp_home()`, or `folder`. OpenAI's files are converted there. Raises `DownloadError`,
    `CheckpointError`, and `ModelNotFoundError` where something would have to be fetched and must not be.
    """
    progress = progress or StderrProgress()
    folder = folder or _folder(model, source)
    if folder is not None and _is_whole(folder, source):
        return folder
    if source == "openai":
        _check_in_bucket(model)
        openai_checkpoint.check_tensorflow()  # before anything is fetched for nothing
    _check_online(model, offline)
    if folder is None:
        raise DownloadError(
            f"{model.name} cannot be kept anywhere: this user has no home directory; set GPT_XP_HOME to a folder"
        )
    with _busy(folder, progress):
        if not _is_whole(folder, source):  # else by another process, for which this one has waited
            try:
                _pull(model, source, folder, progress)
            except KeyboardInterrupt:
                progress.note("stopped; what has come is kept, and the next time goes on from there")
                raise
    return folder


def remove(model: Published) -> list[Path]:
    """Remove what gpt-xp has fetched of `model`, whole or not; return the folders. Raises `DownloadError`."""
    removed = []
    for source in SOURCES:
        folder = _folder(model, source)
        if folder is not None and os.path.lexists(folder):
            with _busy(folder, StderrProgress()):
                shutil.rmtree(folder.resolve())
                if folder.is_symlink():  # to a larger disk, say
                    folder.unlink()
            removed.append(folder)
    return removed


def verifiable(copy: Copy, model: Published) -> list[str]:
    """Return the files of a copy, whole or not, of which it is known what they must be."""
    if copy.source == HUB_CACHE:
        return [file for file in HUB_FILES if model.pin(file).digest and (copy.folder / file).exists()]
    manifest = Manifest(copy.folder)
    return [file for file in _REQUIRED[copy.source] if manifest.knows(file)]


def verify(copy: Copy, model: Published, file: str) -> bool:
    """Hash a file again: whether it is as it was published, or as it was written here. Raises `OSError`.

    One in gpt-xp's own folder that is not so is thrown away, and fetched again the next time the model is used.
    """
    if copy.source == HUB_CACHE:
        return digest_of(copy.folder / file) == model.pin(file).digest
    manifest = Manifest(copy.folder)
    whole = manifest.holds(file, rehash=True)
    if not whole:
        with contextlib.suppress(DownloadError), _busy(copy.folder, StderrProgress()):  # or it may only be read
            Manifest(copy.folder).discard(file)
    return whole


# --- the Hub ---


def _pull_hub(model: Published, folder: Path, progress: Progress) -> None:
    manifest = Manifest(folder)
    for file in HUB_FILES:
        if not manifest.holds(file):
            fetch = _fetch_weights if file == WEIGHTS else _fetch_small
            manifest.record(file, fetch(model, file, folder, progress))
        if file == CONFIG:
            _check_sizes(model, folder, read_config(folder))


def _fetch_small(model: Published, file: str, folder: Path, progress: Progress) -> str:
    cached = _in_hub_cache(model, file)
    if cached is None:
        return download(_on_hub(model, file), folder / file, progress)
    temporary = folder / f"{file}.copy"
    shutil.copyfile(cached, temporary)
    os.replace(temporary, folder / file)
    return digest_of(folder / file)


def _fetch_weights(model: Published, file: str, folder: Path, progress: Progress) -> str:
    """Keep an aligned copy: in the published files no float32 lies where it can be mapped and multiplied."""
    original = folder / f"{file}.original"
    cached = _in_hub_cache(model, file)
    if cached is None:
        remote = _on_hub(model, file)
        if original.exists() and remote.digest != digest_of(original):  # of a process that was killed
            original.unlink()
        if not original.exists():
            download(remote, original, progress, twice=True)
    digest = align_weights(cached or original, folder / file)
    original.unlink(missing_ok=True)
    return f"sha256:{digest}"


def _on_hub(model: Published, file: str) -> Remote:
    pin = model.pin(file)
    token = os.environ.get("HF_TOKEN", "").strip() or None
    url = f"{_endpoint()}/{model.repo}/resolve/{model.revision}/{file}"
    return Remote(url, f"{model.name} {file}", pin.n_bytes, pin.digest, token)


def _endpoint() -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or published.HUB
    scheme, host, _ = origin(endpoint)
    if scheme not in ("https", "http") or not host:
        raise DownloadError("HF_ENDPOINT must be an address such as https://huggingface.co; correct or unset it")
    return endpoint


def _snapshots(model: Published) -> Iterator[Path]:
    """Where huggingface_hub keeps this revision: under the name of the repository, or its short one of old."""
    own = os.environ.get("HF_HUB_CACHE")
    if own is None:
        xdg = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        own = os.path.join(os.environ.get("HF_HOME", os.path.join(xdg, "huggingface")), "hub")
    for repo in (model.repo, model.repo.rpartition("/")[2]):
        folder = os.path.expanduser(os.path.expandvars(own))
        if folder.startswith("~"):  # there is no home directory
            return
        yield Path(folder, f"models--{repo.replace('/', '--')}", "snapshots", model.revision)


def _is_complete_snapshot(model: Published, folder: Path) -> bool:
    def has(*files: str) -> bool:
        return all(os.path.exists(folder / file) for file in files)

    if not (has(CONFIG, WEIGHTS) and (has("tokenizer.json") or has("vocab.json", "merges.txt"))):
        return False
    return model.weights.n_bytes in (None, os.path.getsize(folder / WEIGHTS))


def _in_hub_cache(model: Published, file: str) -> Path | None:
    """The file in the Hub's cache, if it is there and right."""
    pin = model.pin(file).digest
    for path in (folder / file for folder in _snapshots(model)):
        with contextlib.suppress(OSError):  # absent, or not for us to read
            digest = digest_of(path)
            if pin in (None, digest):
                return path
    return None


# --- the bucket ---


def _pull_openai(model: Published, folder: Path, progress: Progress) -> None:
    manifest = Manifest(folder)
    for file in OPENAI_FILES:
        if not manifest.holds(file):
            is_large = file == OPENAI_WEIGHTS  # of which a converted copy is made
            manifest.record(file, download(_in_bucket(model, file), folder / file, progress, twice=is_large))
        if file == "hparams.json":
            _check_sizes(model, folder, GPT2Config(**openai_checkpoint.read_hparams(folder)))
    openai_checkpoint.convert(folder)
    for file in (CONFIG, WEIGHTS):
        manifest.record(file, digest_of(folder / file))


def _in_bucket(model: Published, file: str) -> Remote:
    pin = model.pin(file)
    return Remote(f"{published.BUCKET}/{model.name}/{file}", f"{model.name} {file}", pin.n_bytes, pin.digest)


# --- both ---


def _check_online(model: Published, offline: bool) -> None:
    """Raise `ModelNotFoundError` where `model` is not here, and nothing may be fetched."""
    if offline or is_offline():
        raise ModelNotFoundError(
            f"{model.name} is not on this machine, and gpt-xp is offline (--offline, GPT_XP_OFFLINE or "
            f"HF_HUB_OFFLINE): run `gpt-xp models pull {model.name}` with a network, here or where "
            f"{gpt_xp_home() or 'its cache folder'} can be copied from"
        )


def _check_in_bucket(model: Published) -> None:
    """Raise `ModelNotFoundError` for a model that OpenAI has not published."""
    if not model.in_bucket:
        raise ModelNotFoundError(f"{model.name} is not in OpenAI's bucket; the Hub has it (--source hub)")


def _folder(model: Published, source: str) -> Path | None:
    kept = gpt_xp_home()
    return kept and kept / "models" / model.name / source


def _is_whole(folder: Path, source: str) -> bool:
    manifest = Manifest(folder)
    with contextlib.suppress(OSError):
        return all(manifest.holds(file) for file in _REQUIRED[source])
    return False


def _throw_away_damaged(model: Published, folder: Path, source: str, progress: Progress) -> None:
    manifest = Manifest(folder)
    for file in _REQUIRED[source]:
        if manifest.knows(file) and not manifest.holds(file):
            progress.note(f"{model.name} {file} is missing or damaged here: it is fetched again")
            manifest.discard(file)


def _check_sizes(model: Published, folder: Path, found: GPT2Config) -> None:
    if replace(found, eos_token_id=model.config.eos_token_id, bos_token_id=model.config.bos_token_id) != model.config:
        raise DownloadError(
            f"what was fetched for {model.name} into {folder} is another model: {found}; ask its source"
        )


def _pull(model: Published, source: str, folder: Path, progress: Progress) -> None:
    server = _endpoint() if source == "hub" else published.BUCKET
    progress.note(f"fetching {model.name} from {origin(server)[1]} into {folder}")
    _throw_away_damaged(model, folder, source, progress)
    if gpt_xp_home() in folder.parents:
        _sweep(folder)
    (_pull_hub if source == "hub" else _pull_openai)(model, folder, progress)


def _sweep(folder: Path) -> None:
    """Throw away what a process that was killed had written aside; a download's own .part has another name."""
    for path in folder.glob("*.part"):
        if re.fullmatch(r".+\.[0-9a-f]{8}\.part", path.name):
            path.unlink()


@contextlib.contextmanager
def _busy(folder: Path, progress: Progress) -> Iterator[None]:
    """Make `folder`, and be the only process that works on it.

    Raises `DownloadError` for what goes wrong with the disk in the body.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, progress):
            yield
    except (OSError, NotImplementedError) as error:  # NotImplementedError: filelock's, for a disk without locks
        other = "set GPT_XP_HOME to another folder" if gpt_xp_home() in folder.parents else "name another folder"
        raise DownloadError(
            f"cannot work in {folder} ({error}): check the space and the permissions there, or {other}"
        ) from error


def _lock(folder: Path, progress: Progress) -> AbstractContextManager[Any]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"another process is working on {folder}; waiting for it")
        return lock.acquire()
