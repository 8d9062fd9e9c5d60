"""Draw the losses of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_xp.reporting.plots import GREY, INK, label_ends, new_figure, save_figure, style_axes
from gpt_xp.training.log import Evaluation

MARKED = 40  # points


def save_plot(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write the picture to `path`. Raises as `save_figure` does."""
    save_figure(draw(evaluations), path)


def draw(evaluations: Sequence[Evaluation]) -> Any:
    """Return the figure: the losses of training and of validation over the steps, with the best marked."""
    figure, axes = new_figure(1, 1, figsize=(7, 4.5))
    trained = [(each.step, each.train_loss) for each in evaluations if each.train_loss is not None]
    # Black and grey, because a color stands for a library.
    lines = (("training", GREY, "--", trained),
             ("validation", INK, "-", [(each.step, each.val_loss) for each in evaluations]))  # fmt: skip
    ends = []
    for label, color, dashes, points in lines:
        if points:
            # Few evaluations are shown as points, because a line of one point would not be seen.
            mark = "o" if len(points) < MARKED else None
            axes.plot(*zip(*points, strict=True), label=label, color=color, linestyle=dashes, marker=mark, markersize=3)
            ends.append((*points[-1], color, label))
    label_ends(axes, ends)
    best = min(evaluations, key=lambda each: each.val_loss)
    [ring] = axes.plot(best.step, best.val_loss, "o", color=INK, markersize=8, fillstyle="none",
                       label=f"best: {best.val_loss:.4f} at step {best.step}")  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title("loss, nats per token (lower is better)", fontsize=10, loc="left")
    axes.legend(handles=[ring], frameon=False, fontsize=9)
    style_axes(axes)
    return figure
