"""The trainers of `train.py`: each trains the same params on the same tokens with the same recipe, in its own process.

AdamW with decay on matrices alone and a constant learning rate, gradients clipped to a norm, float32, no dropout. A
`Trainer` is a class in a module here, made of a folder with a checkpoint and of the rows in a batch; `worker.py` runs
it.
"""

from typing import Any, Protocol

import numpy as np

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
CLIP = 1.0


class Trainer(Protocol):
    """A model in training."""

    def describe(self) -> str:
        """Return versions, and the settings that matter."""

    def step(self, tokens: "np.ndarray[Any, Any]") -> float | None:
        """Take a step on `tokens`, int32 [batch, n + 1], and return the loss before it; None where none is computed."""
