"""The process of one trainer, which `train.py` starts: it answers each line of JSON on stdin with one on stdout.

    python benchmarks/training/worker.py nanogpt:Trainer FOLDER 16     (module and class, checkpoint, rows of a batch)

    {"do": "describe"}                        {"description": "..."}
    {"do": "train", "seed": k, "steps": n}    {"seconds": [n numbers], "losses": [n numbers, or nulls],
                                               "page_faults": of all steps, without those that read a file}
    {"do": "quit"}                            the end

All steps of a request are on the same batch: the k-th of random tokens. A failure is answered by {"error": "..."}.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts' folder, as for those that are started from there

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.processes import one_line


def main() -> None:
    """Make the trainer at the first request, and answer until "quit" or the end of stdin."""
    name, folder, batch = sys.argv[1:]
    trainer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            trainer = make(name, Path(folder), int(batch)) if trainer is None else trainer
            if request["do"] == "describe":
                answer = {"description": trainer.describe()}
            else:
                answer = train(trainer, Path(folder), int(batch), request["seed"], request["steps"])
        except Exception as error:  # Any failure of a trainer becomes its answer.
            answer = {"error": one_line(error)}
        print(json.dumps(answer), flush=True)


def make(name: str, folder: Path, batch: int) -> Any:
    """Import a trainer's module, and make it."""
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(f"training.{module}"), kind)(folder, batch)


def train(trainer: Any, folder: Path, batch: int, seed: int, n_steps: int) -> dict[str, Any]:
    """Return the seconds and the losses of some steps: from tokens in NumPy to a loss in Python."""
    config = read_config(folder)
    tokens = np.random.default_rng(seed).integers(0, config.n_vocab, (batch, config.n_ctx + 1), dtype=np.int32)
    seconds, losses, before = [], [], page_faults()
    for _ in range(n_steps):
        begin = time.perf_counter()
        losses.append(trainer.step(tokens))
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses, "page_faults": page_faults() - before}


def page_faults() -> int:
    """Return how many pages of memory this process has been given so far, each zeroed by the system first."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    main()
