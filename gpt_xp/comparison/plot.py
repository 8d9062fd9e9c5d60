"""Draw a comparison: the error layer by layer, and the speed."""

import math
from pathlib import Path
from typing import Any

from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.reporting.plots import (
    INK,
    Bar,
    check_plot,
    draw_bars,
    new_figure,
    save_figure,
    say,
    scale_errors,
    style_axes,
    styles,
)


def save_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path`; its suffix gives the format. Raises as `check_plot` and `save_figure` do."""
    check_plot(path)
    save_figure(draw(comparison), path)


def draw(comparison: Comparison) -> Any:
    """Return the figure: the errors by layer, and the speed of prefill and decode."""
    looks = styles([_name(run) for run in comparison.runs if run.figures or run.speed])
    timed = [run for run in comparison.runs if run.speed]
    n_panels = 3 if timed else 1
    height = max(4.2, 0.6 * len(timed) + 1.6)
    figure, axes = new_figure(
        1, n_panels, figsize=(12 if timed else 7, height), squeeze=False, width_ratios=[3, 1, 1][:n_panels]
    )
    _draw_errors(axes[0][0], comparison, looks)
    for panel, what in zip(axes[0][1:], ("prefill", "decode"), strict=False):
        bars = [Bar(_name(run), looks[_name(run)], run.speed[f"{what}_tokens_per_second"]) for run in timed]
        draw_bars(panel, bars, f"{what}: tokens per second\n(higher is better)")
    for panel in axes[0][2:]:
        panel.set_yticks([])
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    figure.suptitle(f"{comparison.model}: how far from float64 on NumPy, and how fast", fontsize=12)
    return figure


def _draw_errors(axes: Any, comparison: Comparison, looks: dict[str, dict[str, Any]]) -> None:
    """Draw the error of each layer. An error of 0 has no place on the axis, and `scale_errors` marks it."""
    runs = [run for run in comparison.runs if run.figures]
    if not runs:
        say(axes, "no backend could be compared")
        return
    allowed: dict[str, list[float]] = {}
    lines: list[tuple[list[float], dict[str, Any]]] = []
    names: list[str] = []
    for run in runs:
        assert run.figures is not None
        names = [layer.name.removeprefix("block ").replace("embedding", "emb") for layer in run.figures.layers]
        errors = [layer.difference.relative for layer in run.figures.layers]
        drawn = [error if 0 < error < math.inf else math.nan for error in errors]
        axes.plot(drawn, label=_name(run), **looks[_name(run)])
        lines.append((errors, looks[_name(run)]))
        allowed[run.dtype] = [layer.allowed for layer in run.figures.layers]
    for place, (dtype, values) in enumerate(allowed.items()):
        label = None if place else "allowed"  # The legend has it once.
        axes.plot(values, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=label)
        axes.annotate(f"allowed ({dtype})", (len(values) - 1, values[-1]), xytext=(0, 5), textcoords="offset points",
                      ha="right", fontsize=8, color=INK)  # fmt: skip
    scale_errors(axes, lines)
    every = max(1, -(-len(names) // 16))
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title("largest error / largest number of the layer (lower is better)", fontsize=10, loc="left")
    style_axes(axes)


def _name(run: BackendResult) -> str:
    return f"{run.backend} {run.dtype}"
