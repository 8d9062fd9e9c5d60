"""Draw a comparison: the error layer by layer, and the speed."""

from pathlib import Path
from typing import Any

from gpt_xp.comparison.results import Comparison
from gpt_xp.reporting.plots import check_plot, new_figure, save_figure


def save_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path`; its suffix gives the format. Raises as `check_plot` and `save_figure` do."""
    check_plot(path)
    figure, (errors, *speeds) = new_figure(1, 3, figsize=(12, 4.5), gridspec_kw={"width_ratios": [3, 1, 1]})
    _draw_errors(errors, comparison)
    for axes, what in zip(speeds, ("prefill", "decode"), strict=True):
        _draw_speed(axes, comparison, what)
    speeds[1].set_yticklabels([])
    figure.suptitle(f"{comparison.model}: differences to float64 on NumPy, and speed")
    figure.tight_layout()
    save_figure(figure, path)


def _draw_errors(axes: Any, comparison: Comparison) -> None:
    allowed: dict[str, list[float]] = {}
    names: list[str] = []
    for run in comparison.runs:
        if run.figures:
            names = [layer.name.removeprefix("block ") for layer in run.figures.layers]
            errors = [layer.difference.relative or float("nan") for layer in run.figures.layers]
            axes.plot(errors, marker="o", markersize=3, label=f"{run.backend} {run.dtype}")
            allowed[run.dtype] = [layer.allowed for layer in run.figures.layers]
    for dtype, values in allowed.items():
        axes.plot(values, color="grey", linestyle=":", label=f"out of line ({dtype})")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_xlabel("layer")
    axes.set_ylabel("largest error / largest number")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_speed(axes: Any, comparison: Comparison, what: str) -> None:
    runs = [run for run in comparison.runs if run.speed][::-1]  # the first one at the top
    names = [f"{run.backend}\n{run.dtype}" for run in runs]
    axes.barh(names, [run.speed[f"{what}_tokens_per_second"] or 0 for run in runs], height=0.5)
    axes.set_xlabel(f"{what}, tokens per second")
    axes.grid(alpha=0.3, axis="x")
