"""Measure how the time of one token grows with the context on NumPy, and the cost of sampling.

    python benchmarks/decode.py --plot benchmarks/results/decode-124M.png

It measures gpt-xp greedy and sampled (temperature 0.8, top-k 40, top-p 0.95), and the floor: the matrix-vector products
alone, over the same weights, and one read of the cache. The model has float32 random weights of a published shape, read
from a file laid out like the published ones. The contenders take turns, A B A B. A token is timed from ids to the
choice of an id.

The table of growth shows how much longer a token takes at the longest context than at the shortest of 64 and above. It
uses a straight line through all contexts of a round. Beside it stands the time to read the extra bytes of the cache at
the bandwidth of the floor.
"""

import argparse
import statistics
from collections.abc import Sequence

import common

import gpt_xp
from gpt_xp.benchmark.figures import Workload, spread
from gpt_xp.benchmark.results import Benchmark

SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
GREEDY_NAME, SAMPLED_NAME = "gpt-xp numpy", "gpt-xp numpy sampled"


def script() -> None:
    """Run the sweep and print its tables."""
    made = common.parser(__doc__)
    made.add_argument("--contexts", type=common.numbers, default=[16, 64, 128, 256, 512, 768, 960])
    made.add_argument("--backends", default="numpy", help="of gpt-xp (default: numpy)")
    options = made.parse_args()

    with common.checkpoint(options) as folder:
        ours = common.own(folder, options.backends.split(","))
        ours += common.own(folder, ["numpy"], " sampled", sampling=SAMPLED)
        workloads = [Workload(context, n_new=33) for context in options.contexts]
        found = common.run("decode", [*ours, *common.floor(folder)], workloads, options)
    common.report(options, [found], "\n".join([*growth(found, options), *sampling(found, options)]))


def token_bytes(options: argparse.Namespace) -> tuple[int, int]:
    """Return the bytes that every token's step reads of the weights, and of the cache for each token of context."""
    config = gpt_xp.SIZES[options.size]
    # All weights but the position table, of which it reads one row; keys and values, both float32.
    return 4 * (config.n_params - config.n_ctx * config.n_embd), 4 * 2 * config.n_layer * config.n_embd


def growth(found: Benchmark, options: argparse.Namespace) -> list[str]:
    """Return a table of what the context adds, or nothing where it was not swept."""
    contexts = [workload.context for workload in found.workloads]
    bare = common.measured(found, "floor")
    if bare is None or len([context for context in contexts if context >= 64]) < 2:
        return []
    short, long = min(context for context in contexts if context >= 64), max(contexts)
    last, places = contexts.index(long), [place for place, context in enumerate(contexts) if context >= short]
    weights, each = token_bytes(options)
    # The floor reads all of this in one token at the longest context.
    bandwidth = spread([(weights + each * long) / taken for taken in common.seconds(bare, last, "decode")])
    extra = each * (long - short)
    allowed = extra / bandwidth.median
    rows = [[f"one token, from {short} to {long}", "more ms (quartiles)", "of what the extra bytes take"]]
    for standing in found.standings:
        if standing.figures:
            rounds = zip(*(common.seconds(standing, place, "decode") for place in places), strict=True)
            more = spread([(long - short) * slope([contexts[place] for place in places], taken) for taken in rounds])
            rows.append([standing.name, f"{1e3 * more.median:.2f} ({1e3 * more.low:.2f}-{1e3 * more.high:.2f})",
                         f"{more.median / allowed:.2f} x"])  # fmt: skip
    rows.append([f"the cache's extra {extra / 1e6:.1f} MB at {bandwidth.median / 1e9:.1f} GB/s",
                 f"{1e3 * allowed:.2f}", "1.00 x"])  # fmt: skip
    return [common.show(rows, options)]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the straight line that fits best: one slow turn moves it less than a difference of two."""
    return statistics.linear_regression(x, y).slope


def sampling(found: Benchmark, options: argparse.Namespace) -> list[str]:
    """Return a table of sampled to greedy decode at each context."""
    greedy, sampled = common.measured(found, GREEDY_NAME), common.measured(found, SAMPLED_NAME)
    if greedy is None or sampled is None:
        return []
    rows = [["sampled to greedy decode, at", "ratio (quartiles)", ""]]
    for place, workload in enumerate(found.workloads):
        relative = common.ratio(common.seconds(sampled, place, "decode"), common.seconds(greedy, place, "decode"))
        rows.append([str(workload.context), common.as_ratio(relative), common.verdict(relative, 1.05)])
    return [common.show(rows, options)]


if __name__ == "__main__":
    common.main(script)
