"""Draw a benchmark: how the time of a token grows with the context and with the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.figures import Phase, Spread, Workload, WorkloadFigures
from gpt_xp.benchmark.results import Benchmark
from gpt_xp.reporting.plots import (
    INK,
    add_legend,
    check_plot,
    draw_bars,
    label_ends,
    new_figure,
    save_figure,
    style_axes,
    styles,
)
from gpt_xp.reporting.text import short_dtypes


def save_plot(benchmark: Benchmark, path: Path) -> None:
    """Write the picture to `path`; its suffix gives the format. Raises as `check_plot` and `save_figure` do."""
    check_plot(path)
    save_figure(draw(benchmark), path)


def draw(benchmark: Benchmark) -> Any:
    """Return the figure.

    Two panels show milliseconds of decode and prefill over the context, at the smallest batch; with one context they
    are bars. Where there are several batches, one panel shows tokens per second over the batch, at the longest context.
    Bands are quartiles.
    """
    batches = {workload.batch for workload in benchmark.workloads}
    contexts = {workload.context for workload in benchmark.workloads}
    least, longest = min(batches), max(contexts)
    is_over_context = len(contexts) > 1 or len(batches) == 1
    phases = [what for what in ("decode", "prefill") if is_over_context and _is_measured(benchmark, what)]
    n_panels = len(phases) + (len(batches) > 1)
    figure, axes = new_figure(1, n_panels, figsize=(max(6.5, 5 * n_panels), 4.6), squeeze=False)
    panels = list(axes[0])
    for panel, what in zip(panels, phases, strict=False):
        title = f"{what}: ms" + (" a token" if what == "decode" else "") + " (lower is better)"
        if len(contexts) == 1:
            _draw_bars(panel, benchmark, what, f"{title}\n{longest} tokens of context, batch of {least}")
            continue
        _draw(panel, benchmark, lambda w: w.context if w.batch == least else None, _milliseconds(what))
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel(f"tokens of context (batch of {least})", fontsize=9)
    if len(batches) > 1:
        _draw(panels[-1], benchmark, lambda w: w.batch if w.context == longest else None, _rates, base=2)
        panels[-1].set_title("decode: tokens per second (higher is better)", fontsize=10, loc="left")
        panels[-1].set_xlabel(f"prompts in a batch (context {longest})", fontsize=9)
    add_legend(figure, panels[0])
    figure.suptitle(f"{benchmark.title}: medians of {benchmark.rounds} rounds, with quartiles", fontsize=12, wrap=True)
    return figure


def _draw(
    axes: Any,
    benchmark: Benchmark,
    x_of: Callable[[Workload], int | None],
    y_of: Callable[[Workload, WorkloadFigures], Spread | None],
    base: int | None = None,
) -> None:
    """Draw a line for each contender, over the workloads for which `x_of` returns a number.

    Ticks are at these numbers alone. With `base`, the axis is logarithmic.
    """
    looks = _looks(benchmark)
    ticks: set[int] = set()
    ends: list[tuple[float, float, str]] = []
    for result in benchmark.standings:
        points = [
            (x, y)
            for workload, each in zip(benchmark.workloads, result.figures, strict=False)
            if (x := x_of(workload)) is not None and (y := y_of(workload, each)) is not None
        ]
        if points:
            points.sort(key=lambda point: point[0])
            xs = [x for x, _ in points]
            ticks.update(xs)
            [line] = axes.plot(xs, [y.median for _, y in points], label=short_dtypes(result.name), **looks[result.name])
            low, high = [y.low for _, y in points], [y.high for _, y in points]
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            ends.append((xs[-1], points[-1][1].median, line.get_color()))
    if base is not None:
        axes.set_xscale("log", base=base)
    axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    label_ends(axes, ends)
    style_axes(axes)


def _draw_bars(axes: Any, benchmark: Benchmark, what: str, title: str) -> None:
    """Draw a bar for each contender, for the one workload that there is."""
    value = _milliseconds(what)
    found = {
        short_dtypes(result.name): spread.median
        for result in benchmark.standings
        if result.figures and (spread := value(benchmark.workloads[0], result.figures[0])) is not None
    }
    draw_bars(axes, list(found), list(found.values()), title)


def _is_measured(benchmark: Benchmark, what: str) -> bool:
    return any(getattr(each, what) is not None for result in benchmark.standings for each in result.figures)


def _looks(benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Return the style of each contender; the floor is dashed and black."""
    found = styles([result.name for result in benchmark.standings if not result.is_floor])
    floor: dict[str, Any] = {"color": INK, "linestyle": "--"}
    return found | {result.name: floor for result in benchmark.standings if result.is_floor}


def _milliseconds(what: str) -> Callable[[Workload, WorkloadFigures], Spread | None]:
    def value(workload: Workload, figures: WorkloadFigures) -> Spread | None:
        phase: Phase | None = getattr(figures, what)
        if phase is None:
            return None
        found = phase.seconds
        return Spread(1e3 * found.median, 1e3 * found.low, 1e3 * found.high)

    return value


def _rates(workload: Workload, figures: WorkloadFigures) -> Spread | None:
    if figures.decode is None:
        return None
    found = figures.decode.seconds
    return Spread(workload.batch / found.median, workload.batch / found.high, workload.batch / found.low)
