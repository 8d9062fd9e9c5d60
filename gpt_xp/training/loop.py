"""From one step to the next: batches, evaluations, the best checkpoint, and nothing lost on the way."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_carried
from gpt_xp.errors import NumericalError, SettingError
from gpt_xp.model import Model
from gpt_xp.reporting.plots import check_plot
from gpt_xp.reporting.text import listed
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.training import corpus as texts
from gpt_xp.training.corpus import Corpus
from gpt_xp.training.log import LOG, Evaluation, Training, Watcher, read_log, write_log
from gpt_xp.training.program import Program, State, jax_backend
from gpt_xp.training.settings import Settings
from gpt_xp.training.start import check_start, find_config, find_tokenizer, first_params, kept_start
from gpt_xp.training.state import (
    FOLDER,
    START,
    Place,
    begin,
    load_state,
    locked,
    remove_leftovers,
    save_state,
    settings_of,
)
from gpt_xp.tree import tree_map

DIVERGED = 3.0  # nats above the lowest training loss: worse than having forgotten everything but how often tokens occur
SAMPLE_TOKENS = 64


def train(
    data: Any = (), out: str | Path = "", *, resume: bool = False, watcher: Watcher | None = None, **settings: Any
) -> Training:
    """Train a GPT-2 on files of UTF-8 text, and keep the checkpoint that predicts the validation text best.

    `data` is a list of files; `out` a directory, which then holds that checkpoint in the layout that `gpt_xp.load` and
    transformers read, `train.jsonl` with a line for each evaluation, and the folder `training` with all that going on
    needs, a copy of the model to start from included. With `resume`, a run that was stopped or killed goes on from its
    last evaluation, with the settings that it was begun with, and ends with the very params that it would have had (on
    the same machine, on a CPU).

    What is trained: `start`, a model's name or directory, of which `freeze` blocks, the lower ones, and the embeddings
    stay as they are; or a new model of `n_layer`, `n_head`, `n_embd` and `n_ctx`, with the tokenizer of `tokenizer`, a
    model's name or directory, or a new one of `vocab_size` tokens. Rows have `seq_len` tokens (default: the context, at
    most 256). `special_tokens` reads the spelling of a special token, such as `<|endoftext|>` between two texts, as
    that token; without it, it is plain text.

    How: `steps` of `accumulate` times `batch_size` random pieces of the text; AdamW with `beta1`, `beta2` and, on
    matrices only, `weight_decay`; `learning_rate` after `warmup` steps, falling as a cosine to `min_learning_rate`
    times that; gradients clipped to a norm of `clip`. `weight_dropout` is the probability to zero a weight in a step,
    `average` the decay of a running average of the params, which is then what is evaluated and kept. All random
    numbers come from `seed`. `dtype` "bfloat16" multiplies in that where the `device` computes in it.

    What is kept: every `eval_every` steps the loss of up to `eval_tokens` of the validation text is taken, which is
    `val`, a list of files, or the last `val_fraction` of the characters. After `patience` evaluations without a better
    one the run ends (None: never). `sample` is a prompt to continue at each, `plot` a file for a picture of the losses,
    `save_dtype` "float16" halves the checkpoint.

    Raises `SettingError`, `TextError` and `BackendError` before anything is computed; `CheckpointError` where the disk
    is full or a directory is in use, `NumericalError` where training diverges; a Ctrl-C waits for the end of the step,
    saves the state, and is raised then.
    """
    if not str(out):
        raise SettingError("there is nowhere to write to: name a directory (out)")
    directory, watcher = Path(out), watcher or Watcher()
    files = listed(data)
    folder = directory / FOLDER
    if resume:
        chosen = _resumed(settings_of(folder), ({"data": tuple(map(str, files))} if files else {}) | settings)
    else:
        chosen = Settings(data=tuple(map(str, files)), **settings)
    if chosen.plot is not None:
        check_plot(Path(chosen.plot))
    with watcher.loading():
        backend = jax_backend(chosen)
    watcher.loaded(backend)
    if not resume:
        check_start(chosen)
    with locked(folder):
        if not resume:
            begin(folder, chosen)
        remove_leftovers(folder)
        return _Run(chosen, directory, watcher, backend).go()


CHANGEABLE = ("device", "threads", "plot", "sample")  # none of them is part of what is computed


def _resumed(settings: Settings, given: dict[str, Any]) -> Settings:
    """Return the settings that a run was begun with; raise `SettingError` where others are given."""
    asked = replace(settings, **given)
    for name, value in settings.as_dict().items():
        if name not in CHANGEABLE and getattr(asked, name) != value:
            raise SettingError(
                f"this run was begun with {name} {value!r}, not {getattr(asked, name)!r}: leave it out to go on, or "
                "train in another directory"
            )
    return asked


class _Run:
    """A run from its first preparation to its last step."""

    def __init__(self, settings: Settings, directory: Path, watcher: Watcher, backend: Any) -> None:
        self.settings, self.directory, self.watcher, self.backend = settings, directory, watcher, backend
        self.folder = directory / FOLDER
        self.place = Place()
        self.evaluations: list[Evaluation] = []

    def go(self) -> Training:
        """Take all steps that are left."""
        self._prepare()
        settings, place = self.settings, self.place
        per_step = settings.accumulate * settings.batch_size * self.length
        self.watcher.begins(place.step, settings, self.config, self.corpus.counts.train_tokens)
        self.begun = time.monotonic() - place.seconds
        try:
            with _interrupts(self.watcher) as interrupted:
                if not self.evaluations:
                    self._evaluate()
                while place.step < settings.steps and not self._is_stale:
                    loss = self._step()
                    self.watcher.stepped(place.step, loss, per_step)
                    if place.step % settings.eval_every == 0 or place.step == settings.steps:
                        self._evaluate()
                    elif interrupted.is_set():
                        self._save_state()
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            self.watcher.ends()
        best = next(each for each in self.evaluations if each.step == place.best_step)
        return Training(self.directory, place.step, best, tuple(self.evaluations), place.step < settings.steps)

    def _prepare(self) -> None:
        """Make, or find again, the tokenizer, the token ids and the state."""
        settings, folder = self.settings, self.folder
        if not texts.is_tokenized(folder):
            self._tokenize()
        self.tokenizer = Tokenizer.from_directory(folder)
        source = None if settings.start is None else kept_start(settings, folder / START)
        self.config = find_config(settings, self.tokenizer, source)
        self.carried = None if source is None else read_carried(source)
        self.length = settings.length(self.config)
        self.corpus: Corpus = texts.open_corpus(folder, self.tokenizer, self.length)
        self.windows = texts.windows(self.corpus.val, self.length, settings.eval_tokens)
        self.program = Program(settings, self.config, first_params(settings, self.config, source), self.backend)
        self.state: State = self.program.start()
        if (found := load_state(folder, self.state)) is not None:
            self.state, self.place = self.program.to_device(found[0]), found[1]
            self.evaluations = read_log(self.directory / LOG, self.place.step)

    def _tokenize(self) -> None:
        settings = self.settings
        source = kept_start(settings, self.folder / START)
        size = texts.n_bytes(settings)
        with self.watcher.reading("counting characters", size) as advance:
            spans = texts.split(settings, advance)
        with self.watcher.reading("training the tokenizer", size) as advance:
            tokenizer = find_tokenizer(settings, source, spans[0], advance)
        tokenizer.save(self.folder)
        n_vocab = find_config(settings, tokenizer, source).n_vocab
        with self.watcher.reading("tokenizing", size) as advance:
            spelled = texts.tokenize(
                spans, tokenizer, self.folder, n_vocab=n_vocab, special_tokens=settings.special_tokens, advance=advance
            )
        if spelled is not None:
            self.watcher.spelled(spelled)

    def _step(self) -> float:
        """Take one step and return its loss. Raises `NumericalError` where training diverges."""
        settings, place = self.settings, self.place
        n = settings.accumulate * settings.batch_size
        tokens = texts.crops(self.corpus.train, self.length, n, settings.seed, place.step)
        tokens = tokens.reshape(settings.accumulate, settings.batch_size, -1)
        self.state, array = self.program.train(self.state, tokens, place.step)
        loss = float(array)
        place.step += 1
        if not loss < place.lowest_train_loss + DIVERGED:  # NaN is less than nothing
            raise self._diverged(loss)
        place.lowest_train_loss = min(place.lowest_train_loss, loss)
        place.loss_sum += loss
        place.loss_steps += 1
        return loss

    def _evaluate(self) -> None:
        """Take the loss of the validation text, keep the checkpoint if it is the best, and save the state."""
        place, settings = self.place, self.settings
        val_loss = self._val_loss()
        if not math.isfinite(val_loss):
            raise self._diverged(val_loss)
        is_best = val_loss < place.best_loss
        if is_best:
            place.best_loss, place.best_step = val_loss, place.step
        place.worse = 0 if is_best else place.worse + 1
        place.seconds = time.monotonic() - self.begun
        weights = self.program.weights(self.state) if is_best or settings.sample is not None else None
        evaluation = Evaluation(
            step=place.step,
            train_loss=place.loss_sum / place.loss_steps if place.loss_steps else None,
            val_loss=val_loss,
            val_nats_per_character=val_loss * self.corpus.tokens_per_character,
            learning_rate=self.program.learning_rate(max(place.step - 1, 0)),
            tokens=place.step * settings.accumulate * settings.batch_size * self.length,
            seconds=place.seconds,
            is_best=is_best,
            sample=self._sample(weights),
        )
        place.loss_sum, place.loss_steps = 0.0, 0
        self.evaluations.append(evaluation)
        if is_best:
            self._save_checkpoint(weights)
        write_log(self.directory / LOG, self.evaluations)
        save_state(self.folder, self.state, place)
        self.watcher.evaluated(evaluation)
        if settings.plot is not None:
            from gpt_xp.training.plot import save_plot

            save_plot(self.evaluations, Path(settings.plot))

    @property
    def _is_stale(self) -> bool:
        return self.settings.patience is not None and self.place.worse >= self.settings.patience

    def _val_loss(self) -> float:
        rows = self.settings.batch_size
        batches = [self.windows[first : first + rows] for first in range(0, len(self.windows), rows)]
        losses = [self.program.evaluate(self.state, batch) for batch in batches]
        return float(np.average(losses, weights=[len(batch) for batch in batches]))

    def _save_checkpoint(self, weights: Any) -> None:
        weights = tree_map(lambda leaf: leaf.astype(self.settings.save_dtype), weights)
        checkpoint.save(self.directory, weights, self.config, self.tokenizer, self.carried)

    def _save_state(self) -> None:
        self.place.seconds = time.monotonic() - self.begun
        save_state(self.folder, self.state, self.place)

    def _sample(self, weights: Any) -> str | None:
        if self.settings.sample is None:
            return None
        model = Model(weights, self.config, self.tokenizer, "numpy")
        text: str = model.generate(
            self.settings.sample,
            max_tokens=SAMPLE_TOKENS,
            temperature=0.8,
            seed=0,
            special_tokens=self.settings.special_tokens,
        ).text
        return self.settings.sample + text

    def _diverged(self, loss: float) -> NumericalError:
        kept = f"the best checkpoint, of step {self.place.best_step}, is in {self.directory}"
        return NumericalError(
            f"training has diverged: the loss is {loss:.4g} at step {self.place.step}, and was "
            f"{self.place.lowest_train_loss:.4g}; {kept if self.evaluations else 'nothing is kept'}. Begin anew in "
            f"another directory with a learning rate below {self.settings.learning_rate:g}, or a longer warm-up"
        )


@contextmanager
def _interrupts(watcher: Watcher) -> Iterator[threading.Event]:
    """Let Ctrl-C set the event, so that a step is finished first; a second one does what it did before."""
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before != signal.default_int_handler:
        yield interrupted  # somebody else decides what Ctrl-C does
        return

    def remember(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)
        watcher.interrupted()

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
