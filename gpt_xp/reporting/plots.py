"""Helpers for the plots of `compare`, `bench` and `train`. Only this module imports matplotlib."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_xp.atomic_files import check_place, written_aside
from gpt_xp.errors import SettingError
from gpt_xp.installation import install_command

SUFFIXES = (".png", ".svg", ".pdf")
TYPICAL_SIZE = 100_000  # bytes of a picture
INK, SOFT = "#222222", "#999999"

# Okabe and Ito's colors, which people with color blindness can tell apart.
COLORS = {
    "numpy": "#0072B2", "jax": "#D55E00", "torch": "#CC79A7", "cupy": "#009E73", "mlx": "#56B4E9",
    "array-api-strict": "#E69F00", "floor": INK,
}  # fmt: skip
OTHER_COLORS = ("#555555", "#882255", "#999933", "#44AA99", "#332288", "#AA4499", "#661100")
VARIANTS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))  # of one library: float32, float16, int8, ...


def check_plot(path: Path) -> None:
    """Raise `SettingError`, before anything is computed, where no picture can be written to `path`."""
    import importlib.util

    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"a plot cannot be written to {path}: its name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(f"a plot needs matplotlib, which is not installed: {install_command('plot')}")
    check_place(path, "a plot")


def new_figure(rows: int, columns: int, figsize: tuple[float, float], **axes: Any) -> Any:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots` does, which would change the user's backend.

    Its background is white whatever the user's style is: a picture may be shown on a light page or on a dark one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, **axes)


def style_axes(axes: Any) -> None:
    """Leave out what is no number: two of the four lines around the axes, and marks at ticks."""
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def add_legend(figure: Any, axes: Any) -> None:
    """Put the legend of the lines of `axes` below all axes of the figure."""
    lines = axes.get_legend_handles_labels()
    if lines[0]:
        figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def library_of(name: str) -> str:
    """Return the library in the name of a contender or a run: "torch" in "gpt-xp torch+int8@cuda bfloat16"."""
    return re.split(r"[ +@]", name.removeprefix("gpt-xp "))[0]


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each line: one color for a library in every plot; its variants differ in marks and dashes."""
    libraries = list(dict.fromkeys(map(library_of, names)))
    others = [library for library in libraries if library not in COLORS]
    colors = COLORS | {library: OTHER_COLORS[i % len(OTHER_COLORS)] for i, library in enumerate(others)}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        library = library_of(name)
        number = sum(library_of(each) == library for each in found)
        mark, dashes = VARIANTS[number % len(VARIANTS)]
        # Each line is thinner than the one before, which can then be seen below it.
        width = 1.4 + 1.6 * (len(names) - len(found)) / len(names)
        found[name] = {
            "color": colors[library],
            "marker": mark,
            "linestyle": dashes,
            "markersize": 4,
            "linewidth": width,
        }
    return found


def number(x: float) -> str:
    """Return a number with three digits, or all of them before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def draw_bars(axes: Any, names: Sequence[str], values: Sequence[float | None], title: str) -> None:
    """Draw a bar for each value, the first at the top, with its number at the end; "-" where there is none."""
    looks = styles(names)
    height = 0.6 if len(names) > 2 else 0.3
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        look = looks[name]
        is_first = look["linestyle"] == "-"
        axes.barh(place, value or 0, height=height, color=look["color"], alpha=1 if is_first else 0.55,
                  hatch=None if is_first else "//", edgecolor="white", linewidth=0)  # fmt: skip
        text = "-" if value is None else number(value)
        axes.annotate(text, (value or 0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max(filter(None, values), default=1))
    axes.set_title(title, fontsize=10, loc="left")
    style_axes(axes)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str]]) -> None:
    """Write the number at the end of each line, given as x, y and a color; close ones are moved apart."""
    apart = 0.045 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    place = -math.inf
    for x, y, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + apart)
        axes.annotate(number(y), (x, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8,
                      color=color, annotation_clip=False)  # fmt: skip


def scale_errors(axes: Any, lines: Sequence[tuple[Sequence[float], dict[str, Any]]]) -> None:
    """Make the axis logarithmic. Errors of 0 are marked at its bottom, and those that are not finite at its top."""
    axes.set_yscale("log")
    shown = [y for line in axes.lines for y in line.get_ydata() if 0 < y < math.inf] or [1e-7]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    step = -(-(high - low + 1) // 8)
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in range(low, high + 1, step)}
    for label, y, is_there in (
        ("0", 10.0 ** (low - 1), lambda y: y == 0),
        ("not\nfinite", 10.0 ** (high + 1), lambda y: not y < math.inf),
    ):
        for ys, look in lines:
            xs = [x for x, each in enumerate(ys) if is_there(each)]
            if xs:
                ticks[y] = label
                axes.plot(xs, [y] * len(xs), **look | {"linestyle": "", "fillstyle": "none", "markersize": 7})
    axes.set_yticks(sorted(ticks), [ticks[y] for y in sorted(ticks)])
    axes.minorticks_off()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` says, aside first and renamed.

    Raises `CheckpointError`, which names the file, where it cannot be written.
    """
    with written_aside(path, TYPICAL_SIZE) as aside:
        figure.savefig(aside, dpi=120, format=path.suffix[1:].lower(), facecolor="white")
