"""CuPy's decoding by a CUDA graph, beside CuPy without one and transformers, on one GPU and the same weights.

    python benchmarks/cuda_graph.py --size 124M

First the text with a graph is compared with the text without. Then they take turns, A B A B. It has not been run yet:
there was no GPU where it was written.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import common

import gpt_xp
from gpt_xp.bench import Benchmark, Workload

GRAPH, EAGER, TRANSFORMERS = "gpt-xp cupy", "gpt-xp cupy without a graph", "transformers cuda float32"
TARGETS = {EAGER: None, TRANSFORMERS: 3.0}  # how many times as fast a graph shall be
VARIABLE = "GPT_XP_CUPY_GRAPH"
TIE = 1e-3  # a choice with a smaller margin may be another one after rounding
N_NEW = 65


def script() -> None:
    """Run the comparison and print its tables."""
    options = common.parser(__doc__).parse_args()
    with common.checkpoint(options) as folder:
        entries = common.own(folder, ["cupy"])
        if not entries:
            sys.exit("cupy cannot be used here: `gpt-xp backends` says why")
        print(compare_texts(folder), end="\n\n")
        entries.append(replace(entries[0], name=EAGER, command=("env", f"{VARIABLE}=0", *entries[0].command)))
        entries += common.peers(folder, [TRANSFORMERS], options)
        found = common.run("CUDA graph", entries, [Workload(context, n_new=N_NEW) for context in (16, 512)], options)
    common.report(options, [found], common.show([["decode", "tokens", "times as fast", ""], *targets(found)], options))


def compare_texts(model: str | Path) -> str:
    """Return how far the texts agree. Raises `SystemExit` where they differ by more than rounding explains."""
    graph, eager = (generate(model, setting) for setting in ("1", "0"))
    same = [one == other for one, other in zip(graph.token_ids, eager.token_ids, strict=True)]
    n = same.index(False) if False in same else len(same)
    said = f"with a graph and without: {n} of {len(same)} tokens are the same"
    if n < len(same) and eager.margins[n] > TIE:
        sys.exit(f"{said}, and the next was chosen by a margin of {eager.margins[n]:.3f}")
    return said


def generate(model: str | Path, setting: str) -> gpt_xp.Generation:
    """Return a greedy continuation with that setting of the variable. Raises `SystemExit` where it had no effect."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = setting
    try:
        loaded = gpt_xp.load(model, backend="cupy")
        out: gpt_xp.Generation = loaded.generate([1, 2, 3], max_tokens=N_NEW, ignore_eos=True)
        found = loaded.backend.settings()["cuda_graph"]
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    if (found == "yes") != (setting == "1"):
        sys.exit(f"{VARIABLE}={setting}: cuda_graph is {found!r}")
    return out


def targets(found: Benchmark) -> list[list[str]]:
    """Return a row for each context and each of those that were measured beside the graph."""
    rows, mine = [], common.measured(found, GRAPH)
    for place, workload in enumerate(found.workloads):
        for name, least in TARGETS.items():
            other = common.measured(found, name)
            if mine and other:
                times = common.ratio(common.seconds(other, place, "decode"), common.seconds(mine, place, "decode"))
                met = "" if least is None else common.verdict(times, least, at_least=True)
                rows.append([f"to {name}", str(workload.context), common.as_ratio(times), met])
    return rows


if __name__ == "__main__":
    common.main(script)
