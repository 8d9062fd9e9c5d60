"""`gpt-xp train`: train a GPT-2, from scratch or from a trained model."""

import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gpt_xp
from gpt_xp.backend import Backend
from gpt_xp.cli import several
from gpt_xp.cli.interrupts import exit_now
from gpt_xp.cli.options import (
    CONTEXT,
    COUNT,
    SPECIAL_TOKENS,
    TEXT,
    Decorator,
    flag,
    hosts_option,
    json_option,
    mesh_option,
    option,
    together,
)
from gpt_xp.cli.output import is_terminal, note, show, waiting, write, write_json
from gpt_xp.cli.prompts import note_plain_token
from gpt_xp.cli.wording import Command, is_from_variable, is_typed
from gpt_xp.config import GPT2Config
from gpt_xp.training.log import Evaluation, Watcher
from gpt_xp.training.settings import CHANGEABLE, SHAPE, TrainingSettings
from gpt_xp.training.state import FOLDER, is_begun, settings_of

if TYPE_CHECKING:
    from tqdm import tqdm

FILE = click.Path(exists=True, dir_okay=False)  # "-" is not allowed, because the text is read more than once.
NUMBER = click.FloatRange(min=0)
BELOW_ONE = click.FloatRange(min=0, max=1, max_open=True)


def setting(name: str, kind: Any, help: str, **more: Any) -> Decorator:
    """Return an option without a default, because the library has the defaults.

    This also shows which options were given, which `--resume` needs.
    """
    return option(name, type=kind, help=help, **{"metavar": "N" if kind is COUNT else "X"} | more)


model_settings = together(
    setting("--from", str, "Start from a trained model: a name or a directory.", metavar="MODEL", setting="start"),
    setting("--freeze", click.IntRange(min=0), "Keep the N lower blocks and the embeddings unchanged.", metavar="N"),
    setting("--n-layer", COUNT, "From scratch: blocks.  [default: 6]"),
    setting("--n-head", COUNT, "From scratch: attention heads.  [default: 6]"),
    setting("--n-embd", COUNT, "From scratch: width, a multiple of the heads.  [default: 192]"),
    setting("--n-ctx", COUNT, "From scratch: tokens of context.  [default: 256]"),
    setting("--vocab-size", COUNT, "From scratch: train a tokenizer of N tokens on the text.  [default: 1024]"),
    setting("--tokenizer", str, "From scratch: use the tokenizer of a model or directory.", metavar="MODEL"),
    flag("--special-tokens", default=None, help=SPECIAL_TOKENS),  # `--resume` must know whether it was given.
)
optimizer_settings = together(
    setting("--steps", COUNT, "Number of steps.  [default: 2000]"),
    setting("--batch-size", COUNT, "Rows of text that are computed together.  [default: 4]", of="train"),
    setting("--accumulate", COUNT, "Batches in a step, computed one by one, which saves memory.  [default: 4]"),
    setting("--seq-len", COUNT, "Tokens in a row.  [default: the context, at most 256]"),
    setting("--learning-rate", NUMBER, "Highest learning rate.  [default: 0.001]"),
    setting(
        "--min-learning-rate",
        click.FloatRange(0, 1),
        "Last learning rate, as a fraction of the highest.  [default: 0.1]",
    ),
    setting("--warmup", click.IntRange(min=0), "Steps until the highest learning rate.  [default: 100]", metavar="N"),
    setting("--weight-decay", NUMBER, "Weight decay of matrices.  [default: 0.1]"),
    setting("--beta1", BELOW_ONE, "beta1 of AdamW.  [default: 0.9]"),
    setting("--beta2", BELOW_ONE, "beta2 of AdamW.  [default: 0.99]"),
    setting("--clip", NUMBER, "Clip gradients to this norm.  [default: 1]"),
    setting("--weight-dropout", BELOW_ONE, "Zero a weight in a step with this probability.  [default: 0]", metavar="P"),
    setting("--average", BELOW_ONE, "Average the params with this decay; 0: do not.  [default: 0]"),
    setting("--seed", click.IntRange(min=0), "Seed of all random numbers.  [default: 0]", metavar="N", of="train"),
)
evaluation_settings = together(
    setting("--val", FILE, "Validate on FILE.  [default: the end of the data]", metavar="FILE", multiple=True),
    setting("--val-fraction", BELOW_ONE, "Fraction of the characters to validate on.  [default: 0.1]"),
    setting("--eval-every", COUNT, "Evaluate, and save, after every N steps.  [default: 250]"),
    setting("--eval-tokens", COUNT, "Most tokens of the validation text to evaluate on.  [default: 1000000]"),
    setting(
        "--patience", click.IntRange(min=0), "End after N evaluations without a better one; 0: never.  [default: 10]"
    ),
    setting("--sample", TEXT, "Continue this prompt at each evaluation.", metavar="PROMPT"),
    setting(
        "--plot",
        click.Path(dir_okay=False, writable=True),
        "Draw the losses to FILE (png, svg, pdf).",
        metavar="FILE",
        of="train",
    ),
    setting("--save-dtype", click.Choice(["float32", "float16"]), "dtype of the checkpoint.  [default: float32]"),
)


@click.command(cls=Command, context_settings=CONTEXT)
@option("--data", metavar="FILE...", type=FILE, multiple=True, help="The text, UTF-8: one file or several.")
@click.argument("more", metavar="", nargs=-1, type=FILE)
@option("--out", metavar="DIR", required=True, type=click.Path(file_okay=False), help="Directory for the model.")
@flag("--resume", help="Go on with the run in DIR, which was stopped or killed.")
@model_settings
@optimizer_settings
@evaluation_settings
@option(
    "--dtype",
    of="train",
    metavar="DTYPE",
    type=click.Choice(["float32", "bfloat16"]),
    help="dtype of matrix products.  [default: float32]",
)
@option("--device", of="train", metavar="NAME", help="A device of JAX, such as cpu, gpu or cuda:1.")
@option("--threads", metavar="N", type=COUNT, help="Threads of the CPU to use.  [default: JAX's choice]")
@mesh_option
@hosts_option
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    data: tuple[str, ...],
    more: tuple[str, ...],
    out: str,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a GPT-2 on text with JAX, from scratch or from a trained model.

    DIR then holds the model that predicts the validation text best (use it with --model DIR), the evaluations in
    train.jsonl, and in the folder `training` everything that --resume needs. Ctrl-C saves the state of the run.
    """
    if resume and options["mesh"] is None and is_begun(out):
        options["mesh"] = settings_of(Path(out) / FOLDER).mesh
    several.begin(ctx, options)
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    for name in inapplicable(ctx, given, resume):
        del given[name]
    if "from" in given:
        given["start"] = given.pop("from")
    if given.get("patience") == 0:
        given["patience"] = None
    try:
        found = gpt_xp.train([*data, *more], out, resume=resume, watcher=TrainingBar(), **given)
    except KeyboardInterrupt:
        if is_begun(out):
            note(f"stopped; go on with: gpt-xp train --out {shlex.quote(out)} --resume")
        raise
    best = found.best
    if as_json:
        summary = {"directory": str(found.directory), "steps": found.steps, "stopped_early": found.stopped_early}
        write_json(summary | {"best": dataclasses.asdict(best)})
        return
    worse = sum(each.step > best.step for each in found.evaluations)
    early = f" (ended early: {worse} evaluation{'s' * (worse > 1)} without a better one)" if found.stopped_early else ""
    write(f"{found.directory} has the model of step {best.step} of {found.steps}{early}: validation {_losses(best)}\n")


def inapplicable(ctx: click.Context, given: Container[str], resume: bool) -> list[str]:
    """Return the options that variables set and that do not apply to this run."""
    from_scratch = ("tokenizer", "vocab_size", *SHAPE)
    typed = {name for name in ctx.params if is_typed(ctx, name)}
    if resume:
        names = [name for name in ctx.params if name not in CHANGEABLE]
    elif "from" in typed:
        names = list(from_scratch)
    elif typed.intersection(from_scratch):
        names = [
            "from",
            "freeze",
            "tokenizer" if "vocab_size" in typed else "vocab_size" if "tokenizer" in typed else "",
        ]
    else:
        names = list(from_scratch) if "from" in given else ["freeze"]
    return [name for name in names if name in given and is_from_variable(ctx, name)]


class TrainingBar(Watcher):
    """Shows a run on stderr: a progress bar on a terminal, and a line for each evaluation."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def loading(self) -> AbstractContextManager[None]:
        """Show that JAX is being imported where that takes long; Ctrl-C ends the process at once."""
        return waiting("loading jax")

    def loaded(self, backend: Backend) -> None:
        """Keep the programs that JAX compiles for the next run."""
        backend.keep_compiled()

    @contextmanager
    def reading(self, what: str, n_bytes: int | None) -> Iterator[Callable[[int], object]]:
        """Show how much of the text is read."""
        from tqdm import tqdm

        hidden = not is_terminal(sys.stderr)
        with tqdm(desc=what, total=n_bytes, unit="B", unit_scale=True, disable=hidden, delay=1, leave=False) as bar:
            yield bar.update

    def spelled(self, token: str) -> None:
        """Write a line that a special token was read as plain text."""
        note_plain_token(token)

    def begins(self, step: int, settings: TrainingSettings, config: GPT2Config, tokens: int) -> None:
        """Write the size of the model and the text, and start the bar."""
        from tqdm import tqdm

        note(
            f"{config.n_params / 1e6:.2f}M parameters, {tokens:,} tokens to train on"
            + (f"; going on after step {step}" if step else "")
        )
        self._step, self._tokens, self._since = step, 0, time.monotonic()
        self._bar = tqdm(
            total=settings.steps, initial=step, unit="step", dynamic_ncols=True, leave=False,
            disable=not is_terminal(sys.stderr),
        )  # fmt: skip

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        """Move the bar; tqdm draws it at most ten times a second."""
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {self._rate:,.0f} tok/s", refresh=False)
            self._bar.update()

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write a line above the bar."""
        from tqdm import tqdm

        training = "" if evaluation.train_loss is None else f"training {evaluation.train_loss:.4f}, "
        rate = f", {self._rate:,.0f} tok/s" if self._tokens else ""
        best = ", the best so far" if evaluation.is_best else ""
        with tqdm.external_write_mode(file=sys.stderr):
            note(f"step {evaluation.step}: {training}validation {_losses(evaluation)}{rate}{best}")
            if evaluation.sample is not None:
                show(evaluation.sample)
        self._tokens, self._since = 0, time.monotonic()

    def interrupted(self) -> None:
        """Write that the state is saved, and let a second Ctrl-C end the process at once.

        A KeyboardInterrupt at this time has crashed JAX.
        """
        signal.signal(
            signal.SIGINT, exit_now
        )  # This is first, because a second Ctrl-C may come as soon as the line is read.
        with suppress(OSError):
            os.write(
                2, b"\ngpt-xp: saving after this step; Ctrl-C again ends at once\n"
            )  # print must not be used in a signal handler.

    def ends(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._since, 1e-9)


def _losses(evaluation: Evaluation) -> str:
    return f"{evaluation.val_loss:.4f} nats a token ({evaluation.val_nats_per_character:.4f} a character)"
