"""How things are written for people."""


def size(n_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it; 1 kB is 1000 bytes."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.{digits}f} {unit}"
    return f"{n_bytes:.0f} bytes"
