"""Draw a benchmark: how the time of a token grows with the context and with the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.figures import Phase, Spread, Workload, WorkloadFigures
from gpt_xp.benchmark.results import Benchmark
from gpt_xp.reporting.plots import check_plot, new_figure, save_figure
from gpt_xp.reporting.text import short_dtypes


def save_plot(benchmark: Benchmark, path: Path) -> None:
    """Write the picture to `path`; its suffix gives the format. Raises as `check_plot` and `save_figure` do.

    Two panels show milliseconds of decode and prefill over the context, at the smallest batch. Where there are several
    batches, one panel shows tokens per second over the batch, at the longest context. Bands are quartiles.
    """
    check_plot(path)
    batches = {workload.batch for workload in benchmark.workloads}
    contexts = {workload.context for workload in benchmark.workloads}
    least, longest = min(batches), max(contexts)
    over_context = ("decode", "prefill") if len(contexts) > 1 or len(batches) == 1 else ()
    n_panels = len(over_context) + (len(batches) > 1)
    figure, axes = new_figure(1, n_panels, figsize=(max(6, 5 * n_panels), 5), layout="constrained", squeeze=False)
    panels = list(axes[0])
    for panel, what in zip(panels, over_context, strict=False):
        _draw(panel, benchmark, lambda w: w.context if w.batch == least else None, _milliseconds(what))
        panel.set_xlabel(f"tokens of context (batch of {least})")
        panel.set_ylabel(f"{what}, ms" + (" a token" if what == "decode" else ""))
    if len(batches) > 1:
        _draw(panels[-1], benchmark, lambda w: w.batch if w.context == longest else None, _rates)
        panels[-1].set_xlabel(f"batch (context {longest})")
        panels[-1].set_ylabel("decode, tokens per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{benchmark.title}: medians of {benchmark.rounds} rounds, with quartiles", wrap=True)
    save_figure(figure, path)


def _draw(
    axes: Any,
    benchmark: Benchmark,
    x_of: Callable[[Workload], int | None],
    y_of: Callable[[Workload, WorkloadFigures], Spread | None],
) -> None:
    """Draw a line for each contender, over the workloads for which `x_of` returns a number."""
    for index, result in enumerate(benchmark.standings):
        points = [
            (x, y)
            for workload, each in zip(benchmark.workloads, result.figures, strict=False)
            if (x := x_of(workload)) is not None and (y := y_of(workload, each)) is not None
        ]
        if points:
            points.sort(key=lambda point: point[0])
            xs = [x for x, _ in points]
            style = {"color": "black", "linestyle": "--"} if result.is_floor else _style(index)
            [line] = axes.plot(xs, [y.median for _, y in points], label=short_dtypes(result.name), **style)
            low, high = [y.low for _, y in points], [y.high for _, y in points]
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _style(index: int) -> dict[str, Any]:
    """Return a different style for each of 30 lines: ten colors, and another marker and dash for each ten lines."""
    again, color = divmod(index, 10)
    return {"color": f"C{color}", "marker": "os^"[again % 3], "linestyle": ("-", "-.", ":")[again % 3], "markersize": 4}


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
