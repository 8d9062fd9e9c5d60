"""Fetch a published model from the Hugging Face Hub, or copy what its cache has already."""

import os
import shutil
from pathlib import Path

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import align_weights
from gpt_xp.errors import DownloadError
from gpt_xp.hub import hub_cache, published
from gpt_xp.hub.digests import digest_of
from gpt_xp.hub.download import RemoteFile, download
from gpt_xp.hub.manifest import Manifest
from gpt_xp.hub.progress import DownloadProgress
from gpt_xp.hub.published import CONFIG, HUB_FILES, WEIGHTS, Published
from gpt_xp.hub.url_safety import origin


def server_name() -> str | None:
    """Return the name of the server. Raises `DownloadError` where `HF_ENDPOINT` is no address."""
    return origin(_endpoint())[1]


def fetch(model: Published, folder: Path, progress: DownloadProgress) -> None:
    """Fetch the files that `folder` does not hold. Raises `DownloadError`, `CheckpointError`, `ConfigError`."""
    manifest = Manifest(folder)
    for file in HUB_FILES:
        if not manifest.holds(file):
            fetch_file = _fetch_weights if file == WEIGHTS else _fetch_small
            manifest.record(file, fetch_file(model, file, folder, progress))
        if file == CONFIG:
            model.check_config(read_config(folder), folder)


def _fetch_small(model: Published, file: str, folder: Path, progress: DownloadProgress) -> str:
    cached = hub_cache.find_file(model, file)
    if cached is None:
        return download(_remote(model, file), folder / file, progress)
    temporary = folder / f"{file}.copy"
    shutil.copyfile(cached, temporary)
    os.replace(temporary, folder / file)
    return digest_of(folder / file)


def _fetch_weights(model: Published, file: str, folder: Path, progress: DownloadProgress) -> str:
    """Keep an aligned copy, because no float32 in the published files can be mapped."""
    original = folder / f"{file}.original"
    cached = hub_cache.find_file(model, file)
    if cached is None:
        remote = _remote(model, file)
        # A process that was killed may have left a file.
        if original.exists() and remote.digest != digest_of(original):
            original.unlink()
        if not original.exists():
            download(remote, original, progress, room_for_copy=True)
    digest = align_weights(cached or original, folder / file)
    original.unlink(missing_ok=True)
    return f"sha256:{digest}"


def _remote(model: Published, file: str) -> RemoteFile:
    pin = model.pin(file)
    token = os.environ.get("HF_TOKEN", "").strip() or None
    url = f"{_endpoint()}/{model.repo}/resolve/{model.revision}/{file}"
    return RemoteFile(url, f"{model.name} {file}", pin.n_bytes, pin.digest, token)


def _endpoint() -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or published.HUB
    scheme, host, _ = origin(endpoint)
    if scheme not in ("https", "http") or not host:
        raise DownloadError("HF_ENDPOINT must be an address such as https://huggingface.co; correct or unset it")
    return endpoint
