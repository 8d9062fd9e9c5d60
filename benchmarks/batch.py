"""What a batch gains: tokens per second of 1 to 16 prompts that are continued together.

    python benchmarks/batch.py --plot benchmarks/results/batch-124M.png

gpt-xp on NumPy, JAX and PyTorch, beside the floor: the bare products of thin matrices, one row for each prompt, with
the same weights, and one read of all rows' caches. Float32, random weights of a published shape, read from a file laid
out as the published ones. They take turns, A B A B. The last table is the throughput of each batch to that of a single
prompt, within each round.
"""

import argparse

import common

from gpt_xp.benchmark.figures import Spread, Workload, spread
from gpt_xp.benchmark.results import Benchmark, ContenderResult

TARGET_BATCH, TARGET = 8, 4.0


def script() -> None:
    """Run the sweep and print its tables."""
    made = common.parser(__doc__, rounds=5)
    made.add_argument("--batches", type=common.numbers, default=[1, 2, 4, 8, 16])
    made.add_argument("--context", type=int, default=64, help="tokens of each prompt (default: 64)")
    made.add_argument("--backends", default="numpy,jax,torch", help="of gpt-xp (default: numpy,jax,torch)")
    made.add_argument("--peers", action="store_true", help="CTranslate2 and llama.cpp take part too")
    options = made.parse_args()

    with common.checkpoint(options) as folder:
        others = common.peers(folder, ["CTranslate2 float32", "llama.cpp F32"], options) if options.peers else []
        specs = [*common.own(folder, options.backends.split(",")), *others, *common.floor(folder)]
        workloads = [Workload(options.context, batch=batch) for batch in options.batches]
        found = common.run("batch", specs, workloads, options)
    common.report(options, [found], gains(found, options))


def gains(found: Benchmark, options: argparse.Namespace) -> str:
    """Return a table: how many times the tokens per second of a single prompt."""
    batches = [workload.batch for workload in found.workloads]
    if 1 not in batches or len(batches) < 2:
        return ""
    rows = [["times the throughput of one", *map(str, batches), f"at {TARGET_BATCH}"]]
    for standing in found.standings:
        if standing.figures:
            gained = [gain(standing, batches.index(1), place, batch) for place, batch in enumerate(batches)]
            target = [each for batch, each in zip(batches, gained, strict=True) if batch == TARGET_BATCH]
            met = common.verdict(target[0], TARGET, at_least=True) if target else ""
            rows.append([standing.name, *map(common.as_ratio, gained), met])
    return common.show(rows, options)


def gain(standing: ContenderResult, single: int, place: int, batch: int) -> Spread:
    """Return the tokens per second of a batch to those of one prompt, each of one round to the other's of the same."""
    one, many = (common.seconds(standing, at, "decode") for at in (single, place))
    return spread([batch * alone / together for alone, together in zip(one, many, strict=True)])


if __name__ == "__main__":
    common.main(script)
