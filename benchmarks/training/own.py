"""gpt-xp: the compiled step of `gpt-xp train`."""

from pathlib import Path
from typing import Any

import jax

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.training.program import Program, jax_backend
from gpt_xp.training.settings import TrainingSettings
from training import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY


class Trainer:
    """`Program.train`, with the whole recipe as `gpt-xp train` is asked for it."""

    accumulate = 1

    def __init__(self, folder: Path, batch: int) -> None:
        settings = TrainingSettings(
            data=("random tokens",), batch_size=batch // self.accumulate, accumulate=self.accumulate,
            learning_rate=LEARNING_RATE, min_learning_rate=1.0, warmup=0,
            beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY, clip=CLIP,
        )  # fmt: skip
        self.config = read_config(folder)
        self.backend = jax_backend(settings)
        self.program = Program(settings, self.config, read_params(folder, self.config), self.backend)
        self.state = self.program.initial_state()
        self.n_steps = 0

    def describe(self) -> str:
        """Return JAX's version and device."""
        pieces = f", a step in {self.accumulate} pieces" if self.accumulate > 1 else ""
        return f"jax {jax.__version__} on {self.backend.device}{pieces}"

    def step(self, tokens: Any) -> float:
        """Take a step, and return its loss."""
        self.state, loss = self.program.train(
            self.state, tokens.reshape(self.accumulate, -1, tokens.shape[-1]), self.n_steps
        )
        self.n_steps += 1
        jax.block_until_ready(self.state)
        return float(loss)


class OwnMax(Trainer):
    """The same, with the gradient that jax.numpy's own `max` has in a softmax, and gpt-xp leaves out."""

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(folder, batch)
        self.program._xp = self.backend.xp  # before the first step, which traces it

    def describe(self) -> str:
        """Return JAX's version and device."""
        return f"{super().describe()}, softmax's maximum with its gradient"


class Accumulate4(Trainer):
    """Trains with the same step in four parts, whose gradients are added, in a quarter of the memory."""

    accumulate = 4


class Accumulate8(Trainer):
    """The same in eight."""

    accumulate = 8
