"""Measures the memory of this machine and process, and the memory that params and caches take."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from gpt_xp.config import GPT2Config
from gpt_xp.errors import DeviceMemoryError
from gpt_xp.reporting.text import size

ITEM_SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}  # bytes per number, by dtype


def peak_process_memory() -> int | None:
    """Return the peak memory of this process so far, in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # There, getrusage begins with the peak of the parent process.
        with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
            if found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read(), re.MULTILINE):
                return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


def physical_memory() -> int | None:
    """Return the memory of this machine in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def array_bytes(array: Any, dtype: str) -> int:
    """Return the bytes that an array of any library takes in `dtype`."""
    return int(math.prod(array.shape)) * ITEM_SIZE[dtype]


def cache_bytes(config: GPT2Config, rows: int, n_slots: int, dtype: str) -> int:
    """Return the bytes of a key/value cache."""
    return 2 * rows * n_slots * config.n_layer * config.n_embd * ITEM_SIZE[dtype]


@contextlib.contextmanager
def memory_errors(backend: Any, config: GPT2Config, params_bytes: int, rows: int) -> Iterator[None]:
    """Raise `DeviceMemoryError`, with the sizes, when the device runs out of memory in the body."""
    try:
        yield
    except Exception as error:
        if not backend.is_out_of_memory(error):
            raise
        raise too_little_memory(backend, config, params_bytes, rows, config.n_ctx) from error


def too_little_memory(
    backend: Any, config: GPT2Config, params_bytes: int, rows: int, n_slots: int
) -> DeviceMemoryError:
    """Return the error for too little memory, with the sizes of params, cache and device."""
    needs = f"the params take {size(params_bytes)} in {backend.dtype}"
    if rows:
        needs += f" and the cache for {rows} {'row' if rows == 1 else 'rows'} up to "
        needs += size(cache_bytes(config, rows, n_slots, backend.dtype))
    has = f", and there is {size(backend.device_memory)} in all" if backend.device_memory else ""
    return DeviceMemoryError(
        f"{backend.name} ran out of memory on {backend.device}: {needs}{has}; "
        "take fewer prompts or samples at once, fewer max_tokens, a smaller model, or another device"
    )
