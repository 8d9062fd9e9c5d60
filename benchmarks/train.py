"""Measure training in tokens per second: gpt-xp, transformers and nanoGPT's recipe, on the same model and tokens.

    python benchmarks/train.py --markdown              # a process each, A B A B, beside the bare matrix products
    python benchmarks/train.py --profile --markdown    # the parts of gpt-xp's step, each timed alone
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train.py --markdown    # memory in pages of 2 MB, for all
    python benchmarks/train.py --memory --markdown     # the peak memory of fine-tuning 124M, whole processes

The shape is that of the bundled model, and so is the batch: 16 rows of 256 tokens. All train in
float32 with AdamW and clipping, without dropout. Before timing, the losses of the first steps must agree. This shows
that all compute the same forward pass, backward pass and update.
"""

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import shapes

import gpt_xp
from gpt_xp.benchmark.figures import Spread, spread
from gpt_xp.benchmark.machine import describe_machine, usable_cores
from gpt_xp.benchmark.process import ContenderError, ContenderProcess
from gpt_xp.benchmark.report import number, ratio
from gpt_xp.errors import GptXpError
from gpt_xp.processes import thread_variables
from gpt_xp.reporting.text import size, wrapped

CHECKED = 4  # steps whose losses are compared
ALLOWED = 1e-4  # nats between the losses of two trainers
PAUSE = 0.25  # seconds between turns, because threads spin for a while after their turn
TUNING = (*common.TUNING, "GLIBC_", "MALLOC_")  # variables that are printed
REFERENCE, FLOOR = "gpt-xp", "floor"
TRAINERS = {
    REFERENCE: "own:Trainer",
    "gpt-xp, 4 pieces": "own:Accumulate4",
    "gpt-xp, 8 pieces": "own:Accumulate8",
    "gpt-xp, jax.numpy's max": "own:OwnMax",
    "transformers": "in_transformers:Trainer",
    "transformers, eager": "in_transformers:Eager",
    "nanoGPT's recipe": "nanogpt:Trainer",
    FLOOR: "floor:Trainer",
}
WORKER = Path(__file__).parent / "training" / "worker.py"


@dataclass
class TimedTrainer:
    """A trainer, its process, and the seconds and page faults of a step in each round."""

    name: str
    worker: ContenderProcess
    description: str = ""
    losses: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    page_faults: list[float] = field(default_factory=list)

    def train(self, seed: int, steps: int) -> dict[str, Any]:
        """Take steps on the batch of that seed, and return their seconds and losses."""
        try:
            return self.worker.ask("train", seed=seed, steps=steps)
        except ContenderError as error:
            raise GptXpError(f"{self.name}: {error}") from None


def script() -> None:
    """Run the measurement that the options name."""
    options = parser().parse_args()
    # These apply to this process too, because JAX is not loaded yet.
    os.environ.update(thread_variables(options.threads))
    command = shlex.join(["python", "benchmarks/train.py", *sys.argv[1:]])
    print(f"    {command}\n\n{heading(options)}")
    if options.memory:
        from training.memory import measure

        print(common.show(measure(options.batches, options.freeze, options.size), options))
        return
    with checkpoint(options) as folder:
        if options.profile:
            from training.parts import profile

            print(common.show(profile(folder, options.batch, options.rounds), options))
        else:
            trainers = take_turns(folder, options)
            print(common.show(rows(trainers, options.batch * options.n_ctx), options))
            print("".join(wrapped(f"{trainer.name}: {trainer.description}") for trainer in trainers))


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--profile", action="store_true", help="time the parts of gpt-xp's step")
    made.add_argument("--memory", action="store_true", help="take the peak memory of fine-tuning")
    made.add_argument("--threads", type=int, default=usable_cores(), help="default: as many as there are cores")
    made.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    made.add_argument("--steps", type=int, default=3, help="steps in a turn (default: 3)")
    made.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS), help="these alone")
    made.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    shape = made.add_argument_group("the model, and the batch (default: those of the bundled model)")
    for name, default in (("n-layer", 6), ("n-head", 6), ("n-embd", 192), ("n-ctx", 256), ("n-vocab", 1024)):
        shape.add_argument(f"--{name}", type=int, default=default)
    shape.add_argument("--batch", type=int, default=16, help="rows of n-ctx tokens")
    memory = made.add_argument_group("--memory")
    memory.add_argument("--size", default="124M", choices=list(gpt_xp.SIZES))
    memory.add_argument("--batches", type=common.numbers, default=[16, 8, 4], help="default: 16,8,4")
    memory.add_argument("--freeze", type=common.numbers, default=[0, 6], help="blocks kept as they are; default: 0,6")
    return made


def heading(options: argparse.Namespace) -> str:
    """Return the machine, the versions and the shape, for a reader who wants to compare."""
    known = describe_machine()
    tuned = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(TUNING)]
    memory = f", {size(int(known['memory_bytes']))}" if known["memory_bytes"] else ""
    shape = f"fine-tuning {options.size}, 2 steps of 16 rows of 256 tokens" if options.memory else (
        f"{options.n_layer} layers, {options.n_head} heads, {options.n_embd} wide, vocabulary {options.n_vocab}, "
        f"{options.batch} x {options.n_ctx} tokens a step"
    )  # fmt: skip
    return "".join(map(wrapped, (
        f"training: {shape}, float32; threads {options.threads}; {known['date']}",
        f"{known['cpu']}, {known['cores']} cores{memory}; {known['system']}, Python {known['python']}, NumPy "
        f"{known['numpy']}, gpt-xp {known['gpt_xp']}; {' '.join(tuned)}",
    )))  # fmt: skip


@contextlib.contextmanager
def checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    """Yield a folder with the model that all begin with: a new one, as `gpt-xp train` makes it."""
    from gpt_xp.training.start import random_params

    config = gpt_xp.GPT2Config(
        n_layer=options.n_layer, n_head=options.n_head, n_embd=options.n_embd, n_ctx=options.n_ctx,
        n_vocab=options.n_vocab,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = shapes.tokenizer(config.n_vocab)
        gpt_xp.Model(random_params(config, 0), config, tokenizer, backend="numpy").save(temporary)
        yield Path(temporary)


def take_turns(folder: Path, options: argparse.Namespace) -> list[TimedTrainer]:
    """Give each trainer turns, in an order that rotates; return the trainers with their seconds."""
    variables = thread_variables(options.threads)
    with contextlib.ExitStack() as stack:
        trainers = []
        for name in options.only:
            command = [sys.executable, str(WORKER), TRAINERS[name], str(folder), str(options.batch)]
            trainer = TimedTrainer(name, stack.enter_context(ContenderProcess(command, variables)))
            try:  # They start one after the other, because the floor measures which way is faster.
                trainer.description = trainer.worker.ask("describe")["description"]
            except ContenderError as error:
                print(f"{name}: skipped, {error}", file=sys.stderr)
                continue
            trainer.losses = trainer.train(0, CHECKED)["losses"]
            trainers.append(trainer)
        check_losses(trainers)
        for turn in range(options.rounds):
            first = turn % len(trainers)
            for trainer in trainers[first:] + trainers[:first]:
                time.sleep(PAUSE)
                answer = trainer.train(1 + turn, options.steps)
                trainer.seconds.append(sum(answer["seconds"]) / options.steps)
                trainer.page_faults.append(answer["page_faults"] / options.steps)
    return trainers


def check_losses(trainers: Sequence[TimedTrainer]) -> None:
    """Raise `GptXpError` unless all who have losses have the same, and these fall, as they do on one batch."""
    learning = [trainer for trainer in trainers if None not in trainer.losses]
    for trainer in learning:
        first = learning[0]
        if not all(abs(mine - theirs) <= ALLOWED for mine, theirs in zip(trainer.losses, first.losses, strict=True)):
            raise GptXpError(
                f"{trainer.name} does not train as {first.name} does: its first losses are "
                f"{', '.join(f'{loss:.6f}' for loss in trainer.losses)}, where {first.name} has "
                f"{', '.join(f'{loss:.6f}' for loss in first.losses)}"
            )
        if not trainer.losses[-1] < trainer.losses[0]:
            raise GptXpError(f"{trainer.name} does not learn: its loss on one batch goes {trainer.losses}")


def rows(trainers: Sequence[TimedTrainer], n_tokens: int) -> list[tuple[str, ...]]:
    """Return the table: medians, and ratios of tokens per second within the same round, with their quartiles."""
    by_name = {trainer.name: trainer.seconds for trainer in trainers}
    others = [name for name in (REFERENCE, "transformers", "nanoGPT's recipe", FLOOR) if name in by_name]
    table: list[tuple[str, ...]] = [
        ("", "ms a step", "tokens/s", *(f"x {name}" for name in others), "page faults", "loss")
    ]
    for trainer in trainers:
        found = spread(trainer.seconds)
        ratios = ["-" if name == trainer.name else ratio(speed(trainer.seconds, by_name[name])) for name in others]
        loss = "-" if trainer.losses[-1] is None else f"{trainer.losses[-1]:.6f}"
        half = (found.high - found.low) / 2 / found.median
        table.append((
            trainer.name, f"{number(1e3 * found.median)} ±{half:.0%}", number(n_tokens / found.median), *ratios,
            f"{spread(trainer.page_faults).median:.0f}", loss,
        ))  # fmt: skip
    return table


def speed(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return how many times as many tokens per second the first has: the others' seconds over its own, by rounds."""
    return common.ratio(theirs, mine)


if __name__ == "__main__":
    common.main(script)
