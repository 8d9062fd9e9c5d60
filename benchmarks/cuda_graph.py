"""Compare CuPy's decoding with a CUDA graph, without one, and transformers, on one GPU and the same weights.

    python benchmarks/cuda_graph.py --size 124M
    python benchmarks/cuda_graph.py --size 124M --kernels split,append,attention,greedy,all

First the texts with and without a graph are compared. Then the contenders take turns, A B A B. `--kernels` adds the
graph with each of the prepared kernels (`GPT_XP_CUPY_KERNELS`). A kernel that does not make it 1.3 times as fast is not
worth its code. This script has not been run on a GPU yet.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import common

import gpt_xp
from gpt_xp.benchmark.figures import Workload
from gpt_xp.benchmark.results import Benchmark

GRAPH, EAGER, TRANSFORMERS = "gpt-xp cupy", "gpt-xp cupy without a graph", "transformers cuda float32"
TARGETS = {EAGER: None, TRANSFORMERS: 3.0}  # A graph must be so many times as fast.
VARIABLE, KERNELS = "GPT_XP_CUPY_GRAPH", "GPT_XP_CUPY_KERNELS"
WORTH = 1.3  # Prepared kernels must make the graph so many times as fast to be kept.
TIE = 1e-3  # Rounding may change a choice with a smaller margin.
N_NEW = 65


def script() -> None:
    """Run the comparison and print its tables."""
    made = common.parser(__doc__)
    made.add_argument("--kernels", default="", help="prepared kernels to measure too, with commas between")
    options = made.parse_args()
    kernels = list(filter(None, options.kernels.split(",")))
    with common.checkpoint(options) as folder:
        specs = common.own(folder, ["cupy"])
        if not specs:
            sys.exit("cupy cannot be used here: `gpt-xp backends` says why")
        print(compare_texts(folder), end="\n\n")
        graph = specs[0]
        specs.append(replace(graph, name=EAGER, command=("env", f"{VARIABLE}=0", *graph.command)))
        specs += [
            replace(graph, name=with_kernels(name), command=("env", f"{KERNELS}={name}", *graph.command))
            for name in kernels
        ]
        specs += common.peers(folder, [TRANSFORMERS], options)
        found = common.run("CUDA graph", specs, [Workload(context, n_new=N_NEW) for context in (16, 512)], options)
    rows = [["decode", "tokens", "times as fast", ""], *targets(found, kernels)]
    common.report(options, [found], common.show(rows, options))


def with_kernels(name: str) -> str:
    """Return the name of the graph with some of the prepared kernels."""
    return f"{GRAPH} with {name}"


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


def targets(found: Benchmark, kernels: Sequence[str] = ()) -> list[list[str]]:
    """Return a row for each context and each of those that were measured beside the graph."""
    pairs = [(GRAPH, name, least) for name, least in TARGETS.items()]
    pairs += [(with_kernels(name), GRAPH, WORTH) for name in kernels]
    rows = []
    for place, workload in enumerate(found.workloads):
        for name, other_name, least in pairs:
            mine, other = common.measured(found, name), common.measured(found, other_name)
            if mine and other:
                times = common.ratio(common.seconds(other, place, "decode"), common.seconds(mine, place, "decode"))
                met = "" if least is None else common.verdict(times, least, at_least=True)
                rows.append([f"{name} to {other_name}", str(workload.context), common.as_ratio(times), met])
    return rows


if __name__ == "__main__":
    common.main(script)
