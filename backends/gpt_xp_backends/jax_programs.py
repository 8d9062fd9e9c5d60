"""Keeps the programs that JAX compiles on disk, for later processes."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import warnings
from pathlib import Path
from typing import Any

from gpt_xp.environment import gpt_xp_home


def keep_compiled(jax: Any) -> None:
    """Keep compiled programs in the user's cache folder, unless the user has chosen another, or there is none.

    JAX uses the folder for the whole process, from its first program on. So only the command calls this.
    """
    kept = gpt_xp_home()
    if jax.config.jax_compilation_cache_dir is not None or kept is None:
        return
    folder = kept / "jax" / shareable(jax)
    if not _can_be_written(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # After an error of the disk, the program is only compiled again, so the user needs no warning.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def shareable(jax: Any) -> str:
    """Return the name of a folder for programs of these versions, compiled for this kind of CPU.

    JAX's own keys do not include the CPU. Machines that share a home folder would load programs for other CPUs.
    """
    cpu = hashlib.sha256("\n".join(_cpu()).encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-jaxlib-{importlib.metadata.version('jaxlib')}-{platform.machine()}-{cpu}"


def _cpu() -> list[str]:
    """Return a description of the kind of CPU: Linux's description of the first core, or the processor's name."""
    kinds = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features", "isa")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        return [line for line in info.read().partition("\n\n")[0].splitlines() if line.startswith(kinds)]
    return [platform.processor()]
