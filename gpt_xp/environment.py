"""Reading environment variables that say yes or no: one rule for the library, the backends and the command."""

import os

NO = ("0", "false", "f", "no", "n", "off")


def is_yes(value: str) -> bool:
    """Return whether a value says yes: any does that does not say no."""
    return value.strip().lower() not in ("", *NO)


def says_yes(variable: str, default: bool = False) -> bool:
    """Return whether a variable says yes; `default` where it is not set or empty."""
    value = os.environ.get(variable, "")
    return is_yes(value) if value.strip() else default
