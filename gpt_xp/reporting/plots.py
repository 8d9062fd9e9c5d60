"""Helpers for the plots of `compare`, `bench` and `train`. Only this module imports matplotlib."""

from pathlib import Path
from typing import Any

from gpt_xp.atomic_files import check_place, written_aside
from gpt_xp.errors import SettingError
from gpt_xp.installation import install_command

SUFFIXES = (".png", ".svg", ".pdf")
TYPICAL_SIZE = 100_000  # bytes of a picture


def check_plot(path: Path) -> None:
    """Raise `SettingError`, before anything is computed, where no picture can be written to `path`."""
    import importlib.util

    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"a plot cannot be written to {path}: its name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(f"a plot needs matplotlib, which is not installed: {install_command('plot')}")
    check_place(path, "a plot")


def new_figure(rows: int, columns: int, figsize: tuple[float, float], layout: str | None = None, **axes: Any) -> Any:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots` does, which would change the user's backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout=layout)  # type: ignore[arg-type]
    return figure, figure.subplots(rows, columns, **axes)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` says, aside first and renamed.

    Raises `CheckpointError`, which names the file, where it cannot be written.
    """
    with written_aside(path, TYPICAL_SIZE) as aside:
        figure.savefig(aside, dpi=120, format=path.suffix[1:].lower())
