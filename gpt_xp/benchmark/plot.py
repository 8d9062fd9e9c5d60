"""A benchmark as a picture: how the time of a token grows with the context, and with the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.driver import Benchmark
from gpt_xp.benchmark.figures import Figures, Phase, Spread, Workload
from gpt_xp.reporting.plots import check_plot, new_figure, save_figure
from gpt_xp.reporting.text import short_dtypes


def save_plot(benchmark: Benchmark, path: Path) -> None:
    """Write the picture, in the format that the suffix of `path` says. Raises as `check_plot` and `save_figure` do.

    Milliseconds of decode and of prefill over the context, at the smallest batch; and where there are several batches,
    tokens per second over the batch, at the longest context. What was not varied has no panel. Bands are quartiles.
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
    place: Callable[[Workload], int | None],
    value: Callable[[Workload, Figures], Spread | None],
) -> None:
    """Draw a line for each contender, over the workloads that have a place."""
    for index, standing in enumerate(benchmark.standings):
        points = [
            (x, y)
            for workload, each in zip(benchmark.workloads, standing.figures, strict=False)
            if (x := place(workload)) is not None and (y := value(workload, each)) is not None
        ]
        if points:
            points.sort(key=lambda point: point[0])
            places = [x for x, _ in points]
            style = {"color": "black", "linestyle": "--"} if standing.is_floor else _style(index)
            [line] = axes.plot(places, [y.median for _, y in points], label=short_dtypes(standing.name), **style)
            low, high = [y.low for _, y in points], [y.high for _, y in points]
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _style(index: int) -> dict[str, Any]:
    """Return a style of its own for each of many lines: ten colors, and another marker and dash for the next ten."""
    again, color = divmod(index, 10)
    return {"color": f"C{color}", "marker": "os^"[again % 3], "linestyle": ("-", "-.", ":")[again % 3], "markersize": 4}


def _milliseconds(what: str) -> Callable[[Workload, Figures], Spread | None]:
    def value(workload: Workload, figures: Figures) -> Spread | None:
        phase: Phase | None = getattr(figures, what)
        if phase is None:
            return None
        found = phase.seconds
        return Spread(1e3 * found.median, 1e3 * found.low, 1e3 * found.high)

    return value


def _rates(workload: Workload, figures: Figures) -> Spread | None:
    if figures.decode is None:
        return None
    found = figures.decode.seconds
    return Spread(workload.batch / found.median, workload.batch / found.high, workload.batch / found.low)
