"""Measure the gain of a batch: tokens per second for 1 to 16 prompts that are continued together.

    python benchmarks/batch.py --plot benchmarks/results/batch-124M.png

It measures gpt-xp on NumPy, native, JAX and PyTorch, and the floor: the matrix products alone, with one row for each
prompt and the same weights, and one read of the caches of all rows. The model has float32 random weights of a published
shape, read from a file laid out like the published ones. The contenders take turns, A B A B. The last table divides the
throughput of each batch by that of a single prompt, within each round.
"""

import argparse

import common

from gpt_xp.benchmark.figures import Spread, Workload, spread
from gpt_xp.benchmark.results import Benchmark, ContenderResult

TARGETS = {"gpt-xp native": {8: 4.5, 16: 8.0}}
TARGET_BATCH, TARGET = 8, 4.0  # The target of all other contenders.


def script() -> None:
    """Run the sweep and print its tables."""
    made = common.parser(__doc__, rounds=5)
    made.add_argument("--batches", type=common.numbers, default=[1, 2, 4, 8, 16])
    made.add_argument("--context", type=int, default=64, help="tokens of each prompt (default: 64)")
    made.add_argument(
        "--backends", default="numpy,native,jax,torch", help="of gpt-xp (default: numpy,native,jax,torch)"
    )
    made.add_argument("--peers", action="store_true", help="CTranslate2 and llama.cpp take part too")
    options = made.parse_args()

    with common.checkpoint(options) as folder:
        others = common.peers(folder, ["CTranslate2 float32", "llama.cpp F32"], options) if options.peers else []
        specs = [*common.own(folder, options.backends.split(",")), *others, *common.floor(folder)]
        workloads = [Workload(options.context, batch=batch) for batch in options.batches]
        found = common.run("batch", specs, workloads, options)
    common.report(options, [found], gains(found, options))


def gains(found: Benchmark, options: argparse.Namespace) -> str:
    """Return a table of the tokens per second of each batch, divided by those of a single prompt."""
    batches = [workload.batch for workload in found.workloads]
    if 1 not in batches or len(batches) < 2:
        return ""
    rows = [["times the throughput of one", *map(str, batches), "target"]]
    for standing in found.standings:
        if standing.figures:
            gained = [gain(standing, batches.index(1), place, batch) for place, batch in enumerate(batches)]
            targets = TARGETS.get(standing.name, {TARGET_BATCH: TARGET})
            met = [f"{batch}: {common.verdict(each, targets[batch], at_least=True)}"
                   for batch, each in zip(batches, gained, strict=True) if batch in targets]  # fmt: skip
            rows.append([standing.name, *map(common.as_ratio, gained), ", ".join(met)])
    return common.show(rows, options)


def gain(standing: ContenderResult, single: int, place: int, batch: int) -> Spread:
    """Return the tokens per second of a batch divided by those of one prompt, within each round."""
    one, many = (common.seconds(standing, at, "decode") for at in (single, place))
    return spread([batch * alone / together for alone, together in zip(one, many, strict=True)])


if __name__ == "__main__":
    common.main(script)
