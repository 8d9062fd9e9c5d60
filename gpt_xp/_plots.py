"""What the plots of `compare` and `bench` share; only here is matplotlib imported."""

import os
from pathlib import Path
from typing import Any

from gpt_xp.errors import SettingError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise `SettingError`, before anything is computed, where no picture can be written to `path`."""
    import importlib.util

    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(f"a plot cannot be written to {path}: its name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError("a plot needs matplotlib, which is not installed: pip install 'gpt-xp[plot]'")
    if not path.parent.is_dir():
        raise SettingError(f"a plot cannot be written to {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise SettingError(f"a plot cannot be written to {path}: no file may be made in {path.parent}")


def new_figure(rows: int, columns: int, **settings: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots` does."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, **settings)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` says, aside first and renamed; then forget it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
