"""Helpers for the plots of `compare`, `bench` and `train`. Only this module imports matplotlib."""

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_xp.atomic_files import check_place, written_aside
from gpt_xp.errors import SettingError
from gpt_xp.installation import install_command

SUFFIXES = (".png", ".svg", ".pdf")
TYPICAL_SIZE = 100_000  # bytes of a picture
INK, GREY, SOFT = "#222222", "#777777", "#999999"

# Okabe and Ito's colors, which people with color blindness can tell apart.
COLORS = {
    "numpy": "#0072B2", "jax": "#D55E00", "torch": "#CC79A7", "cupy": "#009E73", "mlx": "#56B4E9",
    "array-api-strict": "#E69F00", "native": "#F0E442", "floor": INK,
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


def library_of(name: str) -> str:
    """Return the library in the name of a contender or a run: "torch" in "gpt-xp torch+int8@cuda bfloat16"."""
    return re.split(r"[ +@]", name.removeprefix("gpt-xp "))[0]


def library_colors(libraries: Iterable[str]) -> dict[str, str]:
    """Return the color of each library.

    The libraries of `COLORS` have the same color in every plot. That of another library is chosen by its name. If two
    of them would have the same one, the second in the alphabet takes the next color.
    """
    found: dict[str, str] = {}
    for library in sorted(set(libraries)):
        first = zlib.crc32(library.encode()) % len(OTHER_COLORS)
        wanted = [*OTHER_COLORS[first:], *OTHER_COLORS[:first]]
        free = [color for color in wanted if color not in found.values()]
        found[library] = COLORS.get(library) or (free or wanted)[0]
    return found


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each line: one color for a library in every plot; its variants differ in marks and dashes."""
    colors = library_colors(map(library_of, names))
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


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its style as `styles` returns it, its value, and a note behind the number at its end."""

    name: str
    style: dict[str, Any]
    value: float | None
    note: str = ""


def draw_bars(axes: Any, bars: Sequence[Bar], title: str) -> None:
    """Draw the bars, the first at the top, with their numbers at their ends; "-" where there is no value."""
    height = 0.6 if len(bars) > 2 else 0.3
    for place, bar in enumerate(bars):
        is_plain = bar.style.get("marker") in (None, VARIANTS[0][0])
        axes.barh(place, bar.value or 0, height=height, color=bar.style["color"], alpha=1 if is_plain else 0.55,
                  hatch=None if is_plain else "//", edgecolor="white", linewidth=0)  # fmt: skip
        text = "-" if bar.value is None else number(bar.value) + bar.note
        axes.annotate(text, (bar.value or 0, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=9, color=INK)  # fmt: skip
    axes.set_yticks(range(len(bars)), [bar.name.replace(" ", "\n", 1) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    room = 1.7 if any(bar.note for bar in bars) else 1.25  # for the numbers
    axes.set_xlim(0, room * (max((bar.value or 0 for bar in bars), default=0) or 1))
    axes.set_title(title, fontsize=10, loc="left")
    style_axes(axes)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def say(axes: Any, text: str) -> None:
    """Write a sentence into axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def scale_measured(axes: Any, values: Iterable[int]) -> None:
    """Put the ticks of the x axis at the measured values alone. Powers of two are shown at equal distances.

    A tick that is too close to another one has no number.
    """
    ticks = sorted(set(values))
    are_powers = all(value & (value - 1) == 0 for value in ticks)
    if are_powers:
        axes.set_xscale("log", base=2)
    places = [math.log2(tick) if are_powers else float(tick) for tick in ticks]
    apart = 0.08 * (places[-1] - places[0]) if ticks else 0
    shown: list[float] = []
    for place in places:
        if place == places[-1] or all(abs(place - each) >= apart for each in (*shown, places[-1])):
            shown.append(place)
    labels = [str(tick) if place in shown else "" for tick, place in zip(ticks, places, strict=True)]
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the number and the name at the end of each line, which is given as x, y, a color and the name.

    Close labels are moved apart. A thin line leads from the end to its label, so that none is told by color alone.
    """
    low, high = axes.get_ylim()
    apart = 0.05 * (high - low)
    ordered = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _, _ in ordered:
        places.append(max(y, places[-1] + apart) if places else y)
    limit = high  # The highest label stays below the title.
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - apart
    for (x, y, color, name), place in zip(ordered, places, strict=True):
        axes.annotate(f"{number(y)}  {name}", (x, y), xytext=(14, place), textcoords=("offset points", "data"),
                      va="center", fontsize=8, color=INK, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": color, "linewidth": 1, "shrinkA": 1, "shrinkB": 3,
                                  "relpos": (0, 0.5)})  # fmt: skip


def scale_errors(axes: Any, lines: Sequence[tuple[Sequence[float], dict[str, Any]]]) -> None:
    """Make the axis logarithmic. Errors of 0 are marked at its bottom, and those that are not finite at its top."""
    axes.set_yscale("log")
    shown = [y for line in axes.lines for y in line.get_ydata() if 0 < y < math.inf] or [1e-7]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    step = -(-(high - low + 1) // 8)
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in range(low, high + 1, step)}
    for label, y, is_there in (
        ("0", 10.0 ** (low - 1), lambda y: y == 0),
        ("not finite", 10.0 ** (high + 1), lambda y: not y < math.inf),
    ):
        marked = [[x for x, each in enumerate(ys) if is_there(each)] for ys, _ in lines]
        for place, (ys, look) in enumerate(lines):
            if marked[place]:
                ticks[y] = label
                xs = [x + len(ys) * _beside(x, place, marked) for x in marked[place]]
                axes.plot(xs, [y] * len(xs), **look | {"linestyle": "", "fillstyle": "none", "markersize": 7})
    axes.set_yticks(sorted(ticks), [ticks[y] for y in sorted(ticks)])
    axes.minorticks_off()


def _beside(x: int, place: int, marked: Sequence[Sequence[int]]) -> float:
    """Return how far a line's mark at `x` is moved, as a part of the axis: marks at one place would hide each other."""
    there = [each for each, xs in enumerate(marked) if x in xs]
    return 0.016 * (there.index(place) - (len(there) - 1) / 2)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` says, aside first and renamed.

    Raises `CheckpointError`, which names the file, where it cannot be written.
    """
    with written_aside(path, TYPICAL_SIZE) as aside:
        figure.savefig(aside, dpi=120, format=path.suffix[1:].lower(), facecolor="white")
