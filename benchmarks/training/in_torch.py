"""The optimizer and the step that the trainers on torch share."""

from collections.abc import Callable
from typing import Any

import torch

from training import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY


def adamw(model: torch.nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW, with decay on matrices alone."""
    leaves = list(model.parameters())
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [leaf for leaf in leaves if leaf.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, **settings)


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: Any, loss_of: Callable[[Any, Any], torch.Tensor]
) -> float:
    """Take a step on int32 [batch, n + 1] tokens, with `loss_of` inputs and targets; return the loss."""
    rows = torch.from_numpy(tokens).long()
    loss = loss_of(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def version() -> str:
    """Return torch's version and its threads."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"
