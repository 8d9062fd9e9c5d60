"""Compare the speed of two checkouts of gpt-xp, such as the code before and after a change.

    python benchmarks/before_after.py ../before . --backends numpy,numpy+int8

Each checkout has its own processes, which take turns, A B A B. Ratios are to the first checkout. Both must run in the
Python that runs this script.

Two processes of the same code may differ by 10%, for as long as they run. With `--processes 7`, both are started anew
seven times, and a table at the end has the medians and quartiles over them.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import common

from gpt_xp.benchmark.figures import Workload, spread
from gpt_xp.benchmark.models import gpt_xp_spec
from gpt_xp.benchmark.results import Benchmark, ContenderSpec
from gpt_xp.errors import GptXpError

PLACE = "import gpt_xp, gpt_xp_backends; print(gpt_xp.__file__, gpt_xp_backends.__file__, sep='\\n')"


def script() -> None:
    """Run the benchmark of each backend and print its tables."""
    made = common.parser(__doc__)
    made.add_argument("before", type=Path, help="the root of a checkout")
    made.add_argument("after", type=Path)
    made.add_argument("--backends", default="numpy", help="with commas between; numpy+int8 has quantized weights")
    made.add_argument("--contexts", type=common.numbers, default=[16, 250, 512, 960])
    made.add_argument("--batch", type=common.numbers, default=[1])
    made.add_argument("--n-new", type=int, default=17)
    made.add_argument("--processes", type=int, default=1, metavar="N", help="start both anew N times (default: once)")
    options = made.parse_args()

    workloads = [
        Workload(context, batch=rows, n_new=options.n_new) for rows in options.batch for context in options.contexts
    ]
    found, tables = list[Benchmark](), list[str]()
    with common.checkpoint(options) as folder:
        for backend in options.backends.split(","):
            specs = [
                in_checkout(getattr(options, name), gpt_xp_spec(folder, backend, name=name))
                for name in ("before", "after")
            ]
            title = f"before and after, {backend}"
            runs = [common.run(title, specs, workloads, options) for _ in range(options.processes)]
            found += runs
            tables += [over_processes(backend, runs, options)] if len(runs) > 1 else []
    common.report(options, found, "\n".join(tables))


def over_processes(backend: str, runs: Sequence[Benchmark], options: argparse.Namespace) -> str:
    """Return a table with the medians over the processes of each checkout, and the quartiles of their ratios."""
    pairs = [[common.measured(run, name) for name in ("before", "after")] for run in runs]
    both = [(before, after) for before, after in pairs if before and after]
    rows = [(f"{backend}, {len(both)} processes", "batch", "tokens", "before, ms", "after, ms", "x before")]
    for phase in ("prefill", "decode") if both else ():
        for place, workload in enumerate(runs[0].workloads):
            seconds = [[statistics.median(common.seconds(each, place, phase)) for each in pair] for pair in both]
            ratio = spread([after / before for before, after in seconds])
            medians = [f"{1e3 * statistics.median(column):.1f}" for column in zip(*seconds, strict=True)]
            text = f"{ratio.median:.2f} {ratio.low:.2f}-{ratio.high:.2f}"
            rows.append((phase, str(workload.batch), str(workload.context), *medians, text))
    return common.show(rows, options)


def in_checkout(root: Path, spec: ContenderSpec) -> ContenderSpec:
    """Return the contender with the code of a checkout. Raises `GptXpError` for a folder that is none."""
    root = root.resolve()
    variables = f"PYTHONPATH={root}:{root / 'backends'}", "PYTHONSAFEPATH=1"  # safe: not the code of this folder
    command = ["env", *variables, sys.executable, "-c", PLACE]
    imported = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[:2]
    if [Path(each).parent for each in imported] != [root / "gpt_xp", root / "backends" / "gpt_xp_backends"]:
        raise GptXpError(f"{root} is no checkout of gpt-xp that this Python can import: name the folder of its README")
    return replace(spec, command=("env", *variables, *spec.command))


if __name__ == "__main__":
    common.main(script)
