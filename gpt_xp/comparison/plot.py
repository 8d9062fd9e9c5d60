"""A comparison as a picture: the error layer by layer, and the speed."""

from pathlib import Path
from typing import Any

from gpt_xp.comparison.driver import Comparison
from gpt_xp.errors import SettingError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise `SettingError`, before anything is computed, where no picture can be written to `path`."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError("a plot needs matplotlib, which is not installed: pip install 'gpt-xp[plot]'")
    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"a plot cannot be written to {path}: its name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise SettingError(f"a plot cannot be written to {path}: there is no directory {path.parent}")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture, in the format that the suffix of `path` says. Raises as `check_plot` does, and `OSError`."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, (errors, *speeds) = plt.subplots(1, 3, figsize=(12, 4.5), gridspec_kw={"width_ratios": [3, 1, 1]})
    _draw_errors(errors, comparison)
    for axes, what in zip(speeds, ("prefill", "decode"), strict=True):
        _draw_speed(axes, comparison, what)
    speeds[1].set_yticklabels([])
    figure.suptitle(f"{comparison.model}: differences to float64 on NumPy, and speed")
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


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
