"""Record and report a run: evaluations, which are the lines of `train.jsonl`, and watchers."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt_xp import json_text
from gpt_xp.atomic_files import sync, written_aside
from gpt_xp.backend import Backend
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError
from gpt_xp.training.corpus import Advance
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.tree import finite

LOG = "train.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """One line of `train.jsonl`. Losses are in nats per token; `train_loss` is the mean since the last evaluation."""

    step: int
    train_loss: float | None
    val_loss: float
    val_nats_per_character: float
    learning_rate: float
    tokens: int  # tokens trained on so far
    seconds: float
    is_best: bool
    sample: str | None = None


@dataclass(frozen=True)
class Training:
    """The result of a run: steps taken, all evaluations, and the best of them, whose checkpoint is in `directory`."""

    directory: Path
    steps: int
    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    stopped_early: bool


class Watcher:
    """Watches a run. Every method of this class does nothing: override those that you need."""

    def loading(self) -> AbstractContextManager[None]:
        """Return a context in which JAX is imported, which takes a second or two."""
        return nullcontext()

    def loaded(self, backend: Backend) -> None:
        """Note that JAX is imported, and has compiled nothing yet."""

    def reading(self, what: str, n_bytes: int | None) -> AbstractContextManager[Advance]:
        """Return a context in which `n_bytes` of text are read; its value is called with each number of bytes read."""
        return nullcontext(lambda n: None)

    def spelled(self, token: str) -> None:
        """Note that the text spells a special token, which was read as plain text."""

    def begins(self, step: int, settings: TrainingSettings, config: GPT2Config, tokens: int) -> None:
        """Note that steps begin, after `step` earlier ones; `tokens` is the size of the training text."""

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        """Note that a step is done, with its number, loss and number of tokens."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Note an evaluation."""

    def interrupted(self) -> None:
        """Note a Ctrl-C, in its signal handler; the state is saved after this step."""

    def ends(self) -> None:
        """Note that there are no more steps."""


def write_log(path: Path, evaluations: list[Evaluation]) -> None:
    """Write all evaluations to `path`. Raises `CheckpointError` where the file cannot be written."""
    lines = [json.dumps(finite(asdict(each))) + "\n" for each in evaluations]
    with written_aside(path, sum(map(len, lines))) as aside:
        Path(aside).write_text("".join(lines), encoding="utf-8")
        sync(aside)


def read_log(path: Path, last: int) -> list[Evaluation]:
    """Return the evaluations up to step `last`. A run that was killed may have written one more.

    Raises `CheckpointError` for a line that `write_log` did not write, and for a file that cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): train in another directory") from None
    evaluations = []
    for number, line in enumerate(lines, start=1):
        try:
            evaluations.append(Evaluation(**json_text.parse(line)))
        except (TypeError, ValueError) as error:  # Other fields, or a `JsonError`.
            raise CheckpointError(
                f"{path}, line {number} is no evaluation ({error}): remove the line, then go on (--resume)"
            ) from None
    return [each for each in evaluations if each.step <= last]
