"""Fetch a published model from OpenAI's bucket, and convert it to the layout that gpt-xp reads."""

from pathlib import Path

from gpt_xp.checkpoint import openai
from gpt_xp.config import GPT2Config
from gpt_xp.hub import published
from gpt_xp.hub.digests import digest_of
from gpt_xp.hub.download import RemoteFile, download
from gpt_xp.hub.manifest import Manifest
from gpt_xp.hub.progress import DownloadProgress
from gpt_xp.hub.published import CONFIG, OPENAI_FILES, OPENAI_WEIGHTS, WEIGHTS, Published
from gpt_xp.hub.url_safety import origin


def server_name() -> str | None:
    """Return the name of the server."""
    return origin(published.BUCKET)[1]


def fetch(model: Published, folder: Path, progress: DownloadProgress) -> None:
    """Fetch the files that `folder` does not hold, and convert them there.

    Raises `DownloadError`, `CheckpointError`, `ConfigError`.
    """
    manifest = Manifest(folder)
    for file in OPENAI_FILES:
        if not manifest.holds(file):
            is_large = file == OPENAI_WEIGHTS  # The converted copy also needs room.
            manifest.record(file, download(_remote(model, file), folder / file, progress, room_for_copy=is_large))
        if file == "hparams.json":
            model.check_config(GPT2Config(**openai.read_hparams(folder)), folder)
    openai.convert(folder)
    for file in (CONFIG, WEIGHTS):
        manifest.record(file, digest_of(folder / file))


def _remote(model: Published, file: str) -> RemoteFile:
    pin = model.pin(file)
    return RemoteFile(f"{published.BUCKET}/{model.name}/{file}", f"{model.name} {file}", pin.n_bytes, pin.digest)
