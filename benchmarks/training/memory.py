"""The peak memory of whole processes that fine-tune a model of a published shape, with random weights."""

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
LIMIT = 8e9  # bytes
TEXT = 200_000  # characters: of a tenth of them, even 16 rows of 256 tokens can be made to validate on
CHILD = """
import atexit
from gpt_xp.backend import peak_process_memory
atexit.register(lambda: print("peak", peak_process_memory()))
from gpt_xp.cli import main
main()
"""


def measure(batches: Sequence[int], freezes: Sequence[int], name: str) -> list[tuple[str, ...]]:
    """Return the table: one run of `gpt-xp train --from DIR` for each batch size and number of frozen blocks."""
    config = gpt_xp.SIZES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder, text = Path(temporary) / "model", Path(temporary) / "text.txt"
        folder.mkdir()
        write_published(folder, config)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz    \n"))
        text.write_text("".join(np.random.default_rng(0).choice(letters, TEXT)))
        table: list[tuple[str, ...]] = [("batch-size", "freeze", "peak, GB", f"within {LIMIT / 1e9:g} GB")]
        for freeze in freezes:
            for batch in batches:
                out = Path(temporary) / f"{freeze}-{batch}"
                peak = peak_of(folder, text, out, batch, freeze)
                found = ("killed", "no") if peak is None else (f"{peak / 1e9:.2f}", "yes" if peak <= LIMIT else "no")
                table.append((str(batch), str(freeze), *found))
                print(*table[-1], file=sys.stderr)
    return table


def peak_of(folder: Path, text: Path, out: Path, batch: int, freeze: int) -> int | None:
    """Return the most bytes that the process has held (VmHWM on Linux); None where the system has killed it."""
    command = ["train", "--data", str(text), "--out", str(out), "--from", str(folder), "--seq-len", str(SEQ_LEN),
               "--steps", "2", "--batch-size", str(batch), "--freeze", str(freeze)]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return None
    if done.returncode or not (found := re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)):
        sys.exit(f"it failed: {' '.join(command)}\n{done.stderr}")
    return int(found[1])
