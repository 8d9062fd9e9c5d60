"""The peak memory of whole processes that fine-tune a model of a published shape, with random weights.

All take steps of the same number of rows, `STEP_ROWS` or one batch. A step adds the gradients of several batches.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shapes import write_published

import gpt_xp

SEQ_LEN = 256
STEP_ROWS = 16
LIMIT = 8e9  # bytes
TEXT = 200_000  # characters: of a tenth of them, even 16 rows of 256 tokens can be made to validate on
CHILD = """
import atexit
from gpt_xp.memory import peak_process_memory
atexit.register(lambda: print("peak", peak_process_memory()))
from gpt_xp.cli import main
main()
"""


def measure(batches: Sequence[int], freezes: Sequence[int], name: str) -> list[tuple[str, ...]]:
    """Return the table: a run of `gpt-xp train --from DIR` for each batch size and number of frozen blocks."""
    config = gpt_xp.SIZES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder, text = Path(temporary) / "model", Path(temporary) / "text.txt"
        folder.mkdir()
        write_published(folder, config)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz    \n"))
        text.write_text("".join(np.random.default_rng(0).choice(letters, TEXT)))
        table: list[tuple[str, ...]] = [
            ("batch-size", "accumulate", "freeze", "peak, GB", f"within {LIMIT / 1e9:g} GB")
        ]
        for freeze in freezes:
            for batch in batches:
                settings = {"batch-size": batch, "accumulate": max(STEP_ROWS // batch, 1), "freeze": freeze}
                peak = peak_of(folder, text, settings)
                found = ("killed", "no") if peak is None else (f"{peak / 1e9:.2f}", "yes" if peak <= LIMIT else "no")
                table.append((*map(str, settings.values()), *found))
                print(*table[-1], file=sys.stderr)
    return table


def peak_of(folder: Path, text: Path, settings: dict[str, int]) -> int | None:
    """Return the most bytes that the process has held (VmHWM on Linux); None where the system has killed it."""
    with tempfile.TemporaryDirectory() as out:  # of 2 GB, for 124M
        command = ["train", "--data", str(text), "--out", out, "--from", str(folder), "--seq-len", str(SEQ_LEN),
                   "--steps", "2", *(f"--{name}={value}" for name, value in settings.items())]  # fmt: skip
        done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return None
    if done.returncode or not (found := re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)):
        sys.exit(f"it failed: {' '.join(command)}\n{done.stderr}")
    return int(found[1])
