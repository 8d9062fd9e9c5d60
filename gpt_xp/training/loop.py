"""`gpt_xp.train`: take steps, evaluate, keep the best checkpoint, and save the state so that nothing is lost."""

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

from gpt_xp.backend import Backend
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_carried
from gpt_xp.errors import NumericalError, SettingError
from gpt_xp.model import Model
from gpt_xp.reporting.plots import check_plot
from gpt_xp.reporting.text import listed
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.training import corpus
from gpt_xp.training.corpus import Corpus
from gpt_xp.training.log import LOG, Evaluation, Training, Watcher, read_log, write_log
from gpt_xp.training.program import Program, TrainState, jax_backend
from gpt_xp.training.settings import CHANGEABLE, TrainingSettings
from gpt_xp.training.start import begin_run, check_start, find_config, find_tokenizer, first_params, kept_start
from gpt_xp.training.state import (
    FOLDER,
    START,
    RunCounters,
    load_state,
    locked,
    remove_leftovers,
    save_state,
    settings_of,
)
from gpt_xp.tree import tree_map

# Nats above the lowest training loss. A model that knows only how often tokens occur is closer than that.
DIVERGED = 3.0
SAMPLE_TOKENS = 64
PATHS = ("data", "val", "start", "tokenizer")  # Settings that may differ between machines that train together.


def train(
    data: Any = (),
    out: str | Path = "",
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    hosts: str | None = None,
    **settings: Any,
) -> Training:
    """Train a GPT-2 on files of UTF-8 text; keep the checkpoint that predicts the validation text best.

    Return a `Training` with all evaluations. `data` is a list of files. `out` is a directory. It gets the best
    checkpoint, which `gpt_xp.load` and transformers read, and `train.jsonl` with a line for each evaluation. Its folder
    `training` gets everything needed to resume, including a copy of the model to start from.
    With `resume`, a run that was stopped or killed goes on from its last saved state, with its former settings. It ends
    with exactly the params of an undisturbed run (on the same machine, on a CPU). `watcher` is called on the way.

    The model: `start` is the name or directory of a trained model, whose embeddings and `freeze` lower blocks stay
    unchanged. Without `start`, a new model has `n_layer`, `n_head`, `n_embd` and `n_ctx`. Its tokenizer is that of
    `tokenizer`, the name or directory of a model, or a new one with `vocab_size` tokens. Rows have `seq_len` tokens
    (default: the context, at most 256). `special_tokens` reads the spelling of a special token, such as
    `<|endoftext|>` between two texts, as that token; without it, the spelling is plain text.

    The steps: each of `steps` uses `accumulate` times `batch_size` random crops of the text. AdamW has `beta1`, `beta2`
    and, for matrices only, `weight_decay`. `learning_rate` is reached after `warmup` steps, and falls as a cosine to
    `min_learning_rate` times itself. Gradients are clipped to a norm of `clip`. `weight_dropout` is the probability of
    zeroing a weight in a step. `average` is the decay of a running average of the params, which is then evaluated and
    kept in their place. All random numbers come from `seed`. `dtype` "bfloat16" multiplies in bfloat16 where the
    `device` computes in it. `threads` limits those of the CPU.

    Several devices: with `mesh` "data=N" ("auto": all devices), N devices of JAX share each batch, which N must divide,
    and each holds a part of the params and of the optimizer's state (Rajbhandari et al. 2020, "ZeRO", stage 3). The
    losses are those of one device up to rounding, and a run can be resumed with another `mesh`. `hosts` joins several
    processes, as in `load`: all of them need the same files. Ctrl-C then ends the run at once, and it goes on from its
    last evaluation.

    The evaluations: every `eval_every` steps, the loss in nats per token is taken over at most `eval_tokens` of the
    validation text. That text is `val`, a list of files, or the last `val_fraction` of the characters. After `patience`
    evaluations without a better one the run ends (None: never). `sample` is a prompt to continue at each evaluation,
    `plot` a file for a picture of the losses, and `save_dtype` "float16" halves the checkpoint.

    Raises `SettingError`, `TextError` and `BackendError` before anything is computed; `CheckpointError` where the disk
    is full or the directory is in use; `NumericalError` where training diverges. A Ctrl-C waits for the end of the
    step, saves the state, and then raises `KeyboardInterrupt`.
    """
    if not str(out):
        raise SettingError("there is nowhere to write to: name a directory (out)")
    directory, watcher = Path(out), watcher or Watcher()
    files = listed(data)
    folder = directory / FOLDER
    if resume:
        chosen = _resumed(settings_of(folder), ({"data": tuple(map(str, files))} if files else {}) | settings)
    else:
        chosen = TrainingSettings(data=tuple(map(str, files)), **settings)
    if chosen.plot is not None:
        check_plot(Path(chosen.plot))
    with watcher.loading():
        backend = jax_backend(chosen, hosts)
    watcher.loaded(backend)
    if not resume:
        check_start(chosen)
    run = TrainingRun(chosen, directory, watcher, backend)
    if not run.writes:
        return run.go()
    with locked(folder):
        if not resume:
            begin_run(folder, chosen)
        remove_leftovers(folder)
        return run.go()


def _resumed(settings: TrainingSettings, given: dict[str, Any]) -> TrainingSettings:
    """Return the settings of a run to resume. Raises `SettingError` where `given` has other values for them."""
    asked = replace(settings, **given)
    for name, value in settings.as_dict().items():
        if name not in CHANGEABLE and getattr(asked, name) != value:
            raise SettingError(
                f"this run was begun with {name} {value!r}, not {getattr(asked, name)!r}: leave it out to go on, or "
                "train in another directory"
            )
    return asked


class TrainingRun:
    """A run, from its preparation to its last step."""

    def __init__(self, settings: TrainingSettings, directory: Path, watcher: Watcher, backend: Backend) -> None:
        self.settings, self.directory, self.watcher, self.backend = settings, directory, watcher, backend
        self.folder = directory / FOLDER
        self.writes = backend.process_index == 0  # All processes compute, and the first one writes.
        self.counters = RunCounters()
        self.evaluations: list[Evaluation] = []

    def go(self) -> Training:
        """Take all remaining steps."""
        self._prepare()
        settings, counters = self.settings, self.counters
        per_step = settings.accumulate * settings.batch_size * self.length
        self.watcher.begins(counters.step, settings, self.config, self.corpus.counts.train_tokens)
        self.begun = time.monotonic() - counters.seconds
        try:
            with _interrupts(self.watcher, self.backend) as interrupted:
                if not self.evaluations:
                    self._evaluate()
                while counters.step < settings.steps and not self._is_stale:
                    loss = self._step()
                    self.watcher.stepped(counters.step, loss, per_step)
                    if counters.step % settings.eval_every == 0 or counters.step == settings.steps:
                        self._evaluate()
                    elif interrupted.is_set():
                        self._save_state()
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            self.watcher.ends()
        self.backend.wait_for_others("the last files of the run are written")
        best = next(each for each in self.evaluations if each.step == counters.best_step)
        return Training(self.directory, counters.step, best, tuple(self.evaluations), counters.step < settings.steps)

    def _prepare(self) -> None:
        """Make the tokenizer, the token ids and the state, or load those that an interrupted run has made."""
        settings, folder = self.settings, self.folder
        if self.writes and not corpus.is_tokenized(folder):
            self._tokenize()
        self.backend.wait_for_others("the files of the run are written")
        self.tokenizer = Tokenizer.from_directory(folder)
        source = None if settings.start is None else kept_start(settings, folder / START)
        self.config = find_config(settings, self.tokenizer, source)
        self.carried = None if source is None else read_carried(source)
        self.length = settings.row_length(self.config)
        self.corpus: Corpus = corpus.open_corpus(folder, self.tokenizer, self.length)
        self.validation_rows = corpus.validation_rows(self.corpus.val, self.length, settings.eval_tokens)
        self.program = Program(settings, self.config, first_params(settings, self.config, source), self.backend)
        self.state: TrainState = self.program.initial_state()
        if (found := load_state(folder, self.state)) is not None:
            self.state, self.counters = self.program.to_device(found[0]), found[1]
            self.evaluations = read_log(self.directory / LOG, self.counters.step)
        own = {name: value for name, value in settings.as_dict().items() if name not in (*CHANGEABLE, *PATHS)}
        self.backend.check_agreement((own, self.corpus.counts, self.counters.step))

    def _tokenize(self) -> None:
        settings = self.settings
        source = kept_start(settings, self.folder / START)
        size = corpus.n_bytes(settings)
        with self.watcher.reading("counting characters", size) as advance:
            spans = corpus.split(settings, advance)
        with self.watcher.reading("training the tokenizer", size) as advance:
            tokenizer = find_tokenizer(settings, source, spans[0], advance)
        tokenizer.save(self.folder)
        n_vocab = find_config(settings, tokenizer, source).n_vocab
        with self.watcher.reading("tokenizing", size) as advance:
            spelled = corpus.tokenize(
                spans, tokenizer, self.folder, n_vocab=n_vocab, special_tokens=settings.special_tokens, advance=advance
            )
        if spelled is not None:
            self.watcher.spelled(spelled)

    def _step(self) -> float:
        """Take one step and return its loss. Raises `NumericalError` where training diverges."""
        settings, counters = self.settings, self.counters
        n = settings.accumulate * settings.batch_size
        tokens = corpus.crops(self.corpus.train, self.length, n, settings.seed, counters.step)
        tokens = tokens.reshape(settings.accumulate, settings.batch_size, -1)
        self.state, array = self.program.train(self.state, tokens, counters.step)
        loss = float(self.backend.to_numpy(array))
        counters.step += 1
        if not loss < counters.lowest_train_loss + DIVERGED:  # This is true for NaN too.
            raise self._diverged(loss)
        counters.lowest_train_loss = min(counters.lowest_train_loss, loss)
        counters.loss_sum += loss
        counters.loss_steps += 1
        return loss

    def _evaluate(self) -> None:
        """Compute the validation loss, keep the checkpoint if it is the best, and save the state."""
        counters, settings = self.counters, self.settings
        val_loss = self._val_loss()
        if not math.isfinite(val_loss):
            raise self._diverged(val_loss)
        is_best = val_loss < counters.best_loss
        if is_best:
            counters.best_loss, counters.best_step = val_loss, counters.step
        counters.worse = 0 if is_best else counters.worse + 1
        counters.seconds = time.monotonic() - self.begun
        weights = self.program.weights(self.state) if is_best or settings.sample is not None else None
        sample = self._sample(weights) if self.writes else None
        evaluation = Evaluation(
            step=counters.step,
            train_loss=counters.loss_sum / counters.loss_steps if counters.loss_steps else None,
            val_loss=val_loss,
            val_nats_per_character=val_loss * self.corpus.tokens_per_character,
            learning_rate=self.program.learning_rate(max(counters.step - 1, 0)),
            tokens=counters.step * settings.accumulate * settings.batch_size * self.length,
            seconds=counters.seconds,
            is_best=is_best,
            sample=sample,
        )
        counters.loss_sum, counters.loss_steps = 0.0, 0
        self.evaluations.append(evaluation)
        if is_best and self.writes:
            self._save_checkpoint(weights)
        if self.writes:
            write_log(self.directory / LOG, self.evaluations)
        save_state(self.folder, self.state, counters, self.backend)
        self.watcher.evaluated(evaluation)
        if settings.plot is not None and self.writes:
            from gpt_xp.training.plot import save_plot

            save_plot(self.evaluations, Path(settings.plot))

    @property
    def _is_stale(self) -> bool:
        return self.settings.patience is not None and self.counters.worse >= self.settings.patience

    def _val_loss(self) -> float:
        rows = self.settings.batch_size
        batches = [self.validation_rows[first : first + rows] for first in range(0, len(self.validation_rows), rows)]
        losses = [self.program.evaluate(self.state, batch) for batch in batches]
        return float(np.average(losses, weights=[len(batch) for batch in batches]))

    def _save_checkpoint(self, weights: Any) -> None:
        weights = tree_map(lambda leaf: leaf.astype(self.settings.save_dtype), weights)
        checkpoint.save(self.directory, weights, self.config, self.tokenizer, self.carried)

    def _save_state(self) -> None:
        self.counters.seconds = time.monotonic() - self.begun
        save_state(self.folder, self.state, self.counters, self.backend)

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
        kept = f"the best checkpoint, of step {self.counters.best_step}, is in {self.directory}"
        return NumericalError(
            f"training has diverged: the loss is {loss:.4g} at step {self.counters.step}, and was "
            f"{self.counters.lowest_train_loss:.4g}; {kept if self.evaluations else 'nothing is kept'}. Begin anew in "
            f"another directory with a learning rate below {self.settings.learning_rate:g}, or a longer warm-up"
        )


@contextmanager
def _interrupts(watcher: Watcher, backend: Backend) -> Iterator[threading.Event]:
    """Let a first Ctrl-C only set the event, so that a step is finished; a second one does what it did before.

    One of several processes ends at once: the others may not be interrupted, and saving the state takes all of them.
    """
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before != signal.default_int_handler or backend.process_count > 1:
        yield interrupted  # The user's own program decides what Ctrl-C does.
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
