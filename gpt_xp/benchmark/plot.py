"""Draw a benchmark: how the time of a token grows with the context and with the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.figures import Phase, Spread, Workload, WorkloadFigures
from gpt_xp.benchmark.results import Benchmark
from gpt_xp.reporting.plots import (
    INK,
    Bar,
    check_plot,
    draw_bars,
    label_ends,
    new_figure,
    number,
    save_figure,
    say,
    scale_measured,
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
    Bands are quartiles, which stand behind the numbers of bars.
    """
    batches = {workload.batch for workload in benchmark.workloads}
    contexts = {workload.context for workload in benchmark.workloads}
    least, longest = min(batches), max(contexts)
    measured = [what for what in ("decode", "prefill") if _is_measured(benchmark, what)]
    over_context = measured if len(contexts) > 1 or len(batches) == 1 else []
    over_batch = measured[:1] if len(batches) > 1 else []
    n_panels = max(1, len(over_context) + len(over_batch))
    figure, axes = new_figure(1, n_panels, figsize=(max(6.5, 5.2 * n_panels), 4.2), squeeze=False)
    panels = list(axes[0])
    for panel, what in zip(panels, over_context, strict=False):
        title = f"{what}: ms" + (" a token" if what == "decode" else "") + " (lower is better)"
        if len(contexts) == 1:
            _draw_bars(panel, benchmark, what, f"{title}\n{longest} tokens of context, batch of {least}")
            continue
        _draw(panel, benchmark, lambda w: w.context if w.batch == least else None, _milliseconds(what))
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel(f"tokens of context (batch of {least})", fontsize=9)
    for what in over_batch:
        _draw(panels[-1], benchmark, lambda w: w.batch if w.context == longest else None, _rates(what))
        panels[-1].set_title(f"{what}: tokens per second (higher is better)", fontsize=10, loc="left")
        panels[-1].set_xlabel(f"prompts in a batch (context {longest})", fontsize=9)
    if not measured:
        say(panels[0], "nothing could be measured")
    figure.suptitle(f"{benchmark.title}: medians of {benchmark.rounds} rounds, with quartiles", fontsize=12, wrap=True)
    return figure


def _draw(
    axes: Any,
    benchmark: Benchmark,
    x_of: Callable[[Workload], int | None],
    y_of: Callable[[Workload, WorkloadFigures], Spread | None],
) -> None:
    """Draw a line for each contender, over the workloads for which `x_of` returns a number.

    The axis suits the medians: a band that is far wider than they are is cut off, because it would flatten all lines.
    """
    looks = _looks(benchmark)
    measured: set[int] = set()
    top = 0.0
    ends: list[tuple[float, float, str, str]] = []
    for result in benchmark.standings:
        points = [
            (x, y)
            for workload, each in zip(benchmark.workloads, result.figures, strict=False)
            if (x := x_of(workload)) is not None and (y := y_of(workload, each)) is not None
        ]
        if points:
            points.sort(key=lambda point: point[0])
            xs, spreads = zip(*points, strict=True)
            measured.update(xs)
            name = short_dtypes(result.name)
            [line] = axes.plot(xs, [y.median for y in spreads], label=name, **looks[result.name])
            low, high = [y.low for y in spreads], [y.high for y in spreads]
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            top = max([top, *(min(1.05 * y.high, 1.3 * y.median) for y in spreads)])
            ends.append((xs[-1], spreads[-1].median, line.get_color(), name))
    scale_measured(axes, measured)
    axes.set_ylim(0, top or 1)
    label_ends(axes, ends)
    style_axes(axes)


def _draw_bars(axes: Any, benchmark: Benchmark, what: str, title: str) -> None:
    """Draw a bar for each contender, for the one workload that there is."""
    looks, value = _looks(benchmark), _milliseconds(what)
    bars = [
        Bar(short_dtypes(result.name), looks[result.name], found.median, f" ({number(found.low)}–{number(found.high)})")
        for result in benchmark.standings
        if result.figures and (found := value(benchmark.workloads[0], result.figures[0])) is not None
    ]
    draw_bars(axes, bars, title)


def _is_measured(benchmark: Benchmark, what: str) -> bool:
    return any(getattr(each, what) is not None for result in benchmark.standings for each in result.figures)


def _looks(benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Return the style of each contender that was measured; the floor is dashed and black."""
    found = styles([result.name for result in benchmark.standings if result.figures and not result.is_floor])
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


def _rates(what: str) -> Callable[[Workload, WorkloadFigures], Spread | None]:
    def value(workload: Workload, figures: WorkloadFigures) -> Spread | None:
        phase: Phase | None = getattr(figures, what)
        if phase is None:
            return None
        found, tokens = phase.seconds, workload.batch * (workload.context if what == "prefill" else 1)
        return Spread(tokens / found.median, tokens / found.high, tokens / found.low)

    return value
