"""Draw the losses of a run."""

from collections.abc import Sequence
from pathlib import Path

from gpt_xp.reporting.plots import new_figure, save_figure
from gpt_xp.training.log import Evaluation


def save_plot(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Draw the losses of training and of validation over the steps, and mark the best. Raises as `save_figure` does."""
    figure, axes = new_figure(1, 1, figsize=(7, 4.5), layout="constrained")
    trained = [each for each in evaluations if each.train_loss is not None]
    axes.plot([each.step for each in trained], [each.train_loss for each in trained], label="training")
    axes.plot([each.step for each in evaluations], [each.val_loss for each in evaluations], label="validation")
    best = min(evaluations, key=lambda each: each.val_loss)
    axes.plot(best.step, best.val_loss, "o", color="black", label=f"best: {best.val_loss:.4f} at step {best.step}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    save_figure(figure, path)
