"""transformers' GPT2LMHeadModel with torch's AdamW, both as they come."""

from pathlib import Path
from typing import Any

import transformers
from transformers import GPT2LMHeadModel

from training import in_torch


class Trainer:
    """Trains with the attention that transformers chooses (`sdpa`)."""

    attention: str | None = None

    def __init__(self, folder: Path, batch: int) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(
            folder, attn_implementation=self.attention, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ).train()
        self.optimizer = in_torch.adamw(self.model)

    def describe(self) -> str:
        """Return versions and the kind of attention."""
        kind = self.model.config._attn_implementation
        return f"transformers {transformers.__version__}, {kind} attention, {in_torch.version()}"

    def step(self, tokens: Any) -> float:
        """Take a step, and return its loss."""

        def loss_of(inputs: Any, targets: Any) -> Any:
            # `labels` alone would be shifted once more, and the last token of a row would not be learned from.
            return self.model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

        return in_torch.step(self.model, self.optimizer, tokens, loss_of)


class Eager(Trainer):
    """Trains with attention written out in torch."""

    attention = "eager"
