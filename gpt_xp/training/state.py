"""Keep a run on disk: its folder holds everything that is needed to resume it.

`run.json` holds the settings, `start` a copy of the model or tokenizer to start from, and `state.safetensors`
everything that a step changes.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt_xp import json_text
from gpt_xp.atomic_files import ASIDE_PREFIX, written_aside
from gpt_xp.backend import Backend
from gpt_xp.checked_files import read_json
from gpt_xp.checkpoint.safetensors_file import n_bytes, open_safetensors, write_safetensors
from gpt_xp.errors import CheckpointError, SettingError, TextError, TokenizerError
from gpt_xp.training.log import LOG
from gpt_xp.training.settings import TrainingSettings

DTYPES = {"float32": "F32", "int32": "I32"}  # as safetensors names them
RUN, STATE, START, FOLDER = "run.json", "state.safetensors", "start", "training"


@dataclass
class RunCounters:
    """The progress of a run. Random numbers depend only on the step's number, so they need no state."""

    step: int = 0  # steps taken
    loss_sum: float = 0.0  # nats, summed over the steps since the last evaluation
    loss_steps: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    lowest_train_loss: float = float("inf")
    worse: int = 0  # evaluations since the best one
    seconds: float = 0.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it. Raises `CheckpointError` where another process has locked it.

    Where a new run fails before its first state is saved, because of its settings or its text, the directories that
    this made are removed.
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
            with suppress(OSError):  # The directory may hold files of the user by now.
                for each in made[1:]:
                    each.rmdir()
        raise


def is_begun(directory: str | Path) -> bool:
    """Return whether `directory` holds a run that can be resumed."""
    return (Path(directory) / FOLDER / RUN).exists()


def remove_leftovers(folder: Path) -> None:
    """Remove files that a killed process was writing. Call it while `folder` is locked."""
    for file in (*folder.glob("*.part"), *folder.parent.glob(f"{LOG}.*.part")):
        file.unlink(missing_ok=True)
    for aside in folder.parent.glob(f"{ASIDE_PREFIX}*"):
        shutil.rmtree(aside, ignore_errors=True)


def settings_of(folder: Path) -> TrainingSettings:
    """Return the settings of the run in `folder`. Raises `SettingError` where there is none."""
    if not (folder / RUN).exists():
        raise SettingError(f"{folder.parent} holds no run to go on with: start one without --resume")
    entries = read_json(str(folder / RUN))
    try:
        return TrainingSettings(**entries)
    except TypeError:
        raise SettingError(f"{folder / RUN} is of another version of gpt-xp; train in another directory") from None


def save_state(folder: Path, state: Any, counters: RunCounters, backend: Backend) -> None:
    """Write the state to a temporary file, then rename it, so that a failure leaves the old state intact.

    Arrays are fetched from the devices one by one, because the whole state may not fit into memory. All processes fetch
    them in the same order, and the first process writes. Raises `CheckpointError` where the file cannot be written.
    """
    arrays = dict(_named(state))
    if backend.process_index:
        for array in arrays.values():
            backend.to_numpy(array)
        return
    tensors = {name: (DTYPES[str(array.dtype)], array.shape) for name, array in arrays.items()}
    size = sum(n_bytes(*each) for each in tensors.values())
    with written_aside(folder / STATE, size, "the run is kept as it was: check the permissions") as aside:
        place = {"place": json.dumps(asdict(counters))}
        write_safetensors(aside, tensors, lambda name: backend.to_numpy(arrays[name]), place)


def load_state(folder: Path, like: Any) -> tuple[Any, RunCounters] | None:
    """Return the state as a tree of NumPy arrays with the structure of `like`, and the counters.

    Return None where no state was saved. Raises `CheckpointError` for a damaged file, or one of another model.
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
            counters = RunCounters(**json_text.parse(file.metadata["place"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not say how far the run has come ({error}): start it anew") from None
    return jax.tree.unflatten(jax.tree.structure(like), arrays), counters


def _named(state: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
