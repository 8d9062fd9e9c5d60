"""Find the directory of a model by name, and fetch the model if needed."""

import os
from pathlib import Path

from gpt_xp.checkpoint.openai import convert, has_index, has_tensorflow, is_openai_layout
from gpt_xp.errors import CheckpointError, ModelNotFoundError
from gpt_xp.hub import store
from gpt_xp.hub.published import MODELS, Published, find_published
from gpt_xp.reporting.text import closest_first

BUNDLED = Path(__file__).parents[1] / "models"
BUNDLED_DEFAULT = "shakespeare"
OPENAI_PARTS = ("hparams.json", "checkpoint", "*.index", "*.data-?????-of-?????")  # A tokenizer has none of these.
PUBLISHED_DEFAULT = "124M"


def find_model(name: str | Path | None = None, *, offline: bool = False) -> Path:
    """Return the directory of the model called `name`, which `checkpoint.read` can read.

    `name` is a directory, or else a published model or its alias, or else a bundled model. None means
    `default_model()`. A directory in OpenAI's own layout is converted first. A published model that is not here is
    fetched, unless `offline` or the environment forbids it. Raises `ModelNotFoundError` for any other name,
    `DownloadError`, and `CheckpointError` where OpenAI's files cannot be converted.
    """
    if name is None and not os.environ.get("GPT_XP_MODEL"):
        here = store.copies(MODELS[PUBLISHED_DEFAULT])
        return here[0].folder if here else BUNDLED / BUNDLED_DEFAULT
    name = default_model() if name is None else str(name)
    if os.path.isdir(name):
        return _ready(Path(name))
    if model := find_published(name):
        here = store.copies(model)
        return here[0].folder if here else store.pull(model, offline=offline)
    if name in bundled():
        return BUNDLED / name
    if os.path.exists(name):
        raise ModelNotFoundError(f"{name} is not a directory: give the directory of a model, not a file in it")
    raise ModelNotFoundError(
        f"there is no directory {name!r:.200}, and no model of that name: give a directory that holds config.json, "
        f"model.safetensors and tokenizer files, or one of: {', '.join(closest_first(name, names()))}"
    )


def _ready(folder: Path) -> Path:
    """Convert a directory in OpenAI's layout, so that it can be read as any other."""
    if is_openai_layout(folder):
        convert(folder)
    elif not (folder / "config.json").exists():
        _check_complete(folder)
    return folder


def _check_complete(folder: Path) -> None:
    """Raise `CheckpointError` for a part of OpenAI's layout; encoder.json and vocab.bpe alone are a tokenizer."""
    here = [path.name for file in OPENAI_PARTS for path in sorted(folder.glob(file))]
    lacks = [] if "hparams.json" in here else ["hparams.json"]
    lacks += [] if has_index(folder) else ["the .index of a TensorFlow checkpoint, such as model.ckpt.index"]
    if here and lacks:
        raise CheckpointError(
            f"{folder} has {here[0]}, as OpenAI's checkpoints do, but not {' and '.join(lacks)}; copy all the files"
        )


def default_model() -> str:
    """Return the model used where none is named: `GPT_XP_MODEL`, else 124M if it is here, else the bundled one."""
    if named := os.environ.get("GPT_XP_MODEL"):
        return named
    return PUBLISHED_DEFAULT if store.copies(MODELS[PUBLISHED_DEFAULT]) else BUNDLED_DEFAULT


def get_published(name: str) -> Published:
    """Return the published model called `name`. Raises `ModelNotFoundError`, with the right names."""
    model = find_published(name)
    if name in bundled():
        raise ModelNotFoundError(f"{name} comes with gpt-xp: there is nothing to fetch, to verify or to remove")
    if model is None:
        raise ModelNotFoundError(
            f"{name!r:.80} is no published model; they are: {', '.join(closest_first(name, _published_names()))}"
        )
    return model


def find_in_models_dir(size: str, models_dir: str | Path, *, offline: bool = False) -> Path:
    """Return picoGPT's folder `models_dir/size`, or the folder of the bundled model called `size`.

    Where there is neither, a published model is fetched into the folder. It has OpenAI's files, which TensorFlow reads.
    Where OpenAI has none or TensorFlow is not installed, it has the Hub's. Raises as `find_model` does.
    """
    model = find_published(size)
    if "\0" in os.fspath(models_dir) + size:
        raise ModelNotFoundError("the name of a folder of models holds a NUL, which no name does; correct it")
    for folder in (os.path.join(models_dir, size), os.path.join(models_dir, model.name if model else size)):
        # An index alone is part of a checkpoint too, so nothing may be fetched over it.
        is_there = os.path.exists(os.path.join(folder, "config.json")) and not store.is_begun(Path(folder))
        if is_there or has_index(folder):
            return find_model(folder)
    if size in bundled():
        return BUNDLED / size
    if model is None:
        known = ", ".join(closest_first(size, names()))
        raise ModelNotFoundError(f"there is no model in {str(folder)!r:.200}, and no other of that name: take {known}")
    if model.in_bucket and has_tensorflow():
        return store.pull(model, "openai", Path(models_dir) / model.name, offline=offline)
    here = store.copies(model)  # The Hub's files may be in any folder.
    return here[0].folder if here else store.pull(model, "hub", Path(models_dir) / model.name, offline=offline)


def bundled() -> list[str]:
    """Return the names of the models that come with gpt-xp."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())


def names() -> list[str]:
    """Return the names that `find_model` knows and their aliases, without the names of the Hub's repositories."""
    return [*_published_names(), *bundled()]


def _published_names() -> list[str]:
    return [name for model in MODELS.values() for name in (model.name, *model.aliases) if "/" not in name]
