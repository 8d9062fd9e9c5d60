"""Environment variables that several parts of gpt-xp read: flags, `GPT_XP_HOME`, offline mode."""

import os
from pathlib import Path

NO = ("0", "false", "f", "no", "n", "off")


def is_yes(value: str) -> bool:
    """Return whether a value switches a flag on. Every value does, except an empty one and those in `NO`."""
    return value.strip().lower() not in ("", *NO)


def says_yes(variable: str, default: bool = False) -> bool:
    """Return whether a variable switches a flag on; `default` if it is empty or not set."""
    value = os.environ.get(variable, "")
    return is_yes(value) if value.strip() else default


def is_offline() -> bool:
    """Return whether `GPT_XP_OFFLINE` or `HF_HUB_OFFLINE` forbids the use of the network."""
    return says_yes("GPT_XP_OFFLINE") or says_yes("HF_HUB_OFFLINE")


def gpt_xp_home() -> Path | None:
    """Return the folder for models and compiled programs: `GPT_XP_HOME`, or gpt-xp's folder in the user's cache.

    Return None if there is no such place, as for a user of a container without a home directory. Nothing is kept then.
    """
    if named := os.environ.get("GPT_XP_HOME"):
        folder = os.path.expanduser(named)
        return None if folder.startswith("~") else Path(os.path.abspath(folder))
    import platformdirs

    try:
        folder = platformdirs.user_cache_dir("gpt-xp")
    except (RuntimeError, OSError):
        return None
    return Path(folder) if os.path.isabs(folder) else None  # Some versions return "~/.cache/gpt-xp".


def gpt_xp_home_text() -> str:
    """Return `gpt_xp_home()` as a text for messages."""
    return str(gpt_xp_home() or "GPT_XP_HOME (which is not set, and this user has no home directory)")
