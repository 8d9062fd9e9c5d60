"""A run on disk: everything that going on needs is in its folder.

`run.json` holds the settings, `start` a copy of the model or tokenizer to start from, and `state.safetensors` all that
a step changes.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt_xp import json_text
from gpt_xp.atomic_files import ASIDE_PREFIX, sync, write_json, written_aside
from gpt_xp.checked_files import read_json
from gpt_xp.checkpoint.safetensors_file import open_safetensors
from gpt_xp.errors import CheckpointError, SettingError, TextError, TokenizerError
from gpt_xp.training.corpus import COUNTS
from gpt_xp.training.log import LOG
from gpt_xp.training.settings import Settings
from gpt_xp.training.start import keep_start

RUN, STATE, START, FOLDER = "run.json", "state.safetensors", "start", "training"


@dataclass
class Place:
    """How far a run has come. The random numbers of a step depend on its number alone, so they need no state."""

    step: int = 0  # steps taken
    loss_sum: float = 0.0  # of the steps since the last evaluation
    loss_steps: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    lowest_train_loss: float = float("inf")
    worse: int = 0  # evaluations since the best
    seconds: float = 0.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep a second process out of it. Raises `CheckpointError` where it is in use.

    Where a run fails at once, or has no text or settings to go on with, nothing is left: what this made is removed.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        problem = f"another process is training in {folder.parent}: wait for it, or train in another directory"
        raise CheckpointError(problem) from None
    except Exception as error:
        hopeless = isinstance(error, SettingError | TextError | TokenizerError) and not (folder / STATE).exists()
        if made and (hopeless or not (folder / RUN).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # somebody has put something there
                for each in made[1:]:
                    each.rmdir()
        raise


def begin(folder: Path, settings: Settings) -> None:
    """Write down what a new run begins with: a copy of the model to start from, and last of all its settings.

    Raises `SettingError` where its files would replace other work, `CheckpointError` where the copy cannot be made.
    """
    if (folder / STATE).exists():
        raise SettingError(
            f"{folder.parent} holds a run already: go on with it (--resume), train in another directory, or remove it"
        )
    if (folder.parent / "config.json").exists() and not (folder / RUN).exists():
        raise SettingError(f"{folder.parent} holds a model that was not trained there: train in another directory")
    for name in (RUN, COUNTS):  # what a former attempt has left may be of other settings
        (folder / name).unlink(missing_ok=True)
    keep_start(settings, folder / START)
    with written_aside(folder / RUN, 1000) as aside:
        write_json(aside, settings.as_dict())


def is_begun(directory: str | Path) -> bool:
    """Whether there is a run in `directory` to go on with."""
    return (Path(directory) / FOLDER / RUN).exists()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing; while `folder` is locked, nobody else writes there."""
    for file in (*folder.glob("*.part"), *folder.parent.glob(f"{LOG}.*.part")):
        file.unlink(missing_ok=True)
    for aside in folder.parent.glob(f"{ASIDE_PREFIX}*"):
        shutil.rmtree(aside, ignore_errors=True)


def settings_of(folder: Path) -> Settings:
    """Return the settings of the run in `folder`. Raises `SettingError` where there is none."""
    if not (folder / RUN).exists():
        raise SettingError(f"{folder.parent} holds no run to go on with: start one without --resume")
    entries = read_json(str(folder / RUN))
    try:
        return Settings(**entries)
    except TypeError:
        raise SettingError(f"{folder / RUN} is of another version of gpt-xp; train in another directory") from None


def save_state(folder: Path, state: Any, place: Place) -> None:
    """Write everything aside, then rename: a failure, or a kill, leaves the former state whole.

    Raises `CheckpointError` where it cannot be written.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in _named(state)}
    with written_aside(folder / STATE, sum(each.nbytes for each in tensors.values())) as aside:
        try:
            save_file(tensors, aside, metadata={"place": json.dumps(asdict(place))})
        except SafetensorError as error:  # so it calls a full disk
            raise CheckpointError(
                f"cannot write {folder / STATE} ({error}); the run is kept as it was: make room, then go on (--resume)"
            ) from error
        sync(aside)


def load_state(folder: Path, like: Any) -> tuple[Any, Place] | None:
    """Return the state as a tree of NumPy arrays with the structure of `like`, and the place; None before the first.

    Raises `CheckpointError` for a file that is damaged, or of another shape of model.
    """
    import jax

    path = folder / STATE
    if not path.exists():
        return None
    expected = {name: leaf.shape for name, leaf in _named(like)}
    with open_safetensors(str(path)) as file:
        if {name: tensor.shape for name, tensor in file.tensors.items()} != expected:
            raise CheckpointError(f"{path} is of another model, or of another version: train in another directory")
        arrays = [file.read(name) for name in expected]
        try:
            place = Place(**json_text.parse(file.metadata["place"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not say how far the run has come ({error}): start it anew") from None
    return jax.tree.unflatten(jax.tree.structure(like), arrays), place


def _named(state: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
