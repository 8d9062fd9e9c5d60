"""The description of a job, `job.json`: everything that its texts depend on."""

import dataclasses
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_xp import json_text
from gpt_xp.atomic_files import sync, write_json
from gpt_xp.errors import CheckpointError, JsonError, SettingError
from gpt_xp.hub.digests import digest_of
from gpt_xp.jobs.inputs import Input

JOB = "job.json"
VERSION = 1
KINDS = ("generate", "score", "choices")
FORMATS = ("jsonl", "parquet")
# The files of a model's directory that decide what it computes: config, weights, tokenizer.
MODEL_FILES = re.compile(
    r"(generation_)?config\.json|.*\.safetensors|.*\.safetensors\.index\.json|vocab\.json|merges\.txt|tokenizer\.json"
    r"|encoder\.json|vocab\.bpe|added_tokens\.json|tokenizer_config\.json|special_tokens_map\.json"
)


@dataclass(frozen=True)
class Job:
    """A job: its kind, model, settings, seed and input files. Every record of the job depends on these alone.

    `digest` is a hash of the model's files. `settings` are those of the `kind`, such as `max_tokens`. `shard_bytes` is
    the length of a shard in the input.
    """

    kind: str
    model: str
    digest: str
    dtype: str
    quantize: str | None
    settings: dict[str, Any]
    format: str
    shard_bytes: int
    seed: int
    inputs: tuple[Input, ...]
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """Return the job as a dict of values that JSON can hold."""
        return dataclasses.asdict(self)


def begin_job(out: Path, asked: Job, has_seed: bool) -> tuple[Job, bool]:
    """Write `job.json` to `out`, and return the job and True; or return the job that is there already, and False.

    One of several processes at once writes it. Without `has_seed`, the seed of `asked` is drawn at random, and that of
    the job counts. Raises `SettingError` where the job there has other settings, and `CheckpointError` where the file
    cannot be written.
    """
    path = out / JOB
    if out.exists() and not out.is_dir():
        raise SettingError(f"{out} is a file, and a job writes to a directory: name one as the last argument (out)")
    with _writing(path):
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists() and _create(path, asked.as_dict()):
            return asked, True
    job = read_job(out)
    if (difference := _difference(job, asked, has_seed)) is not None:
        name, ours, theirs = difference
        raise SettingError(
            f"this job was begun with {name} {ours}, not {theirs}: give what it was begun with to go on, or write to "
            "another directory"
        )
    return job, False


def forget_job(out: Path) -> None:
    """Remove `job.json`, and the directory if it holds nothing else."""
    with suppress(OSError):
        (out / JOB).unlink()
        out.rmdir()


def read_job(out: Path) -> Job:
    """Return the job in `out`. Raises `SettingError` where there is none, or one of another version."""
    path, patience = out / JOB, 10
    while True:
        try:
            entries = json_text.parse(path.read_bytes())
            job = Job(**entries | {"inputs": tuple(Input(**each) for each in entries["inputs"])})
            if job.version != VERSION:
                raise TypeError
            return job
        except (FileNotFoundError, NotADirectoryError):
            raise SettingError(f"{out} holds no bulk job: {JOB} is missing there") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path} ({error.strerror or error}); check the permissions") from None
        except JsonError:  # Where the file system has no hard links, another process may be writing it.
            patience -= 1
            if not patience:
                raise SettingError(f"{path} is damaged: put it back, or write to another directory") from None
            time.sleep(0.1)
        except (TypeError, KeyError):
            raise SettingError(f"{path} is of another version of gpt-xp: write to another directory") from None


def model_digest(folder: Path) -> str:
    """Return one hash of all files of a model's directory that decide what it computes."""
    whole = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if MODEL_FILES.fullmatch(path.name) and path.is_file():
                whole.update(f"{path.name} {digest_of(path)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder} ({error}); check the files and their permissions") from None
    return f"sha256:{whole.hexdigest()}"


def model_stamp(folder: Path) -> str:
    """Return the names, sizes and times of the files that `model_digest` hashes. It takes no time."""
    try:
        found = [(each.name, each.stat()) for each in sorted(folder.iterdir()) if MODEL_FILES.fullmatch(each.name)]
    except OSError:
        return ""
    return repr([(name, status.st_size, status.st_mtime_ns) for name, status in found])


def _create(path: Path, entries: dict[str, Any]) -> bool:
    """Write the file if it does not exist; return False if another process was first. Raises `OSError`."""
    aside = f"{path}.{secrets.token_hex(4)}.part"
    try:
        write_json(aside, entries)
        sync(aside)
        return _put(aside, path)
    finally:
        with suppress(OSError):
            os.remove(aside)


def _put(aside: str, path: Path) -> bool:
    """Make a file `path` unless that exists; return False if it does."""
    try:
        os.link(aside, path)  # Unlike a renaming, this fails if the file exists.
    except FileExistsError:
        return False
    except OSError:  # The file system has no hard links.
        try:
            path.open("xb").close()  # Another process may find the file empty for a moment.
        except FileExistsError:
            return False
        os.replace(aside, path)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):  # Windows cannot open a folder.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror or error}); check the permissions") from error


def _difference(job: Job, asked: Job, has_seed: bool) -> tuple[str, str, str] | None:
    """Return the first setting that differs, and its two values; None where the jobs are the same."""
    for name in ("kind", "dtype", "quantize", "format", "shard_bytes", *(["seed"] if has_seed else [])):
        if (ours := getattr(job, name)) != (theirs := getattr(asked, name)):
            return name, repr(ours), repr(theirs)
    for name in {**job.settings, **asked.settings}:
        if (ours := job.settings.get(name)) != (theirs := asked.settings.get(name)):
            return name, repr(ours), repr(theirs)
    if job.digest != asked.digest:  # The same files under another name are the same model.
        return "model", f"{job.model!r} ({job.digest:.14})", f"{asked.model!r} ({asked.digest:.14})"
    return _other_input(job.inputs, asked.inputs)


def _other_input(ours: Sequence[Input], theirs: Sequence[Input]) -> tuple[str, str, str] | None:
    if [each.path for each in ours] != [each.path for each in theirs]:
        return "inputs", *(", ".join(each.path for each in files) for files in (ours, theirs))  # type: ignore[return-value]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("size", "mtime_ns"):
            if getattr(mine, name) != getattr(other, name):
                unit = "bytes" if name == "size" else "ns (time of its last change)"
                shown = [f"of {getattr(each, name)} {unit}" for each in (mine, other)]
                return mine.path, *shown  # type: ignore[return-value]
    return None
