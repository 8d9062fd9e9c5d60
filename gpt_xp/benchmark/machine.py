"""The machine that a benchmark runs on."""

import datetime
import os
import platform
import re
from pathlib import Path

import numpy as np

from gpt_xp.memory import physical_memory
from gpt_xp.version import __version__


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, str | int | None]:
    """Return versions, processor, cores, memory in bytes, and the date."""
    return {
        "gpt_xp": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": physical_memory(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    """Return the name of the processor, or its architecture where the name is not known."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
