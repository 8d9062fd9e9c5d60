"""How things are written for people."""

from collections.abc import Sequence


def size(n_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it; 1 kB is 1000 bytes."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.{digits}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return lines with aligned columns, the last of which is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(line + "\n" for line in lines)
