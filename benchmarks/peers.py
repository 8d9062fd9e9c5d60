"""Compare the speed of gpt-xp with other engines, on the same machine and the same weights.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --size 124M --plot benchmarks/results/peers-124M.png

gpt-xp on each backend, on NumPy quantized to int8, and on native in each precision that it has, against transformers,
CTranslate2, llama.cpp and picoGPT's algorithm. The floors are the matrix products alone, over the same weights: in
NumPy, for JAX in XLA, and for int8 with gpt-xp's compiled products. An engine that is not installed is skipped, with
the reason.

The model has random weights of a published shape, and is read from a file laid out like the published ones. The files
of CTranslate2 and llama.cpp are converted from it, in a temporary folder. Each contender has its own process, with a
fixed number of threads. First all logits are compared with those of gpt-xp on NumPy. Then they take turns, A B A B.
Decode is one token, and prefill a whole prompt up to the choice of the first token. Both are greedy, from token ids to
token ids.

llama.cpp F32 takes part twice, with its flash attention and without: one is faster in prefill, the other in decode.

The last tables are the targets: ratios within each round, with their quartiles.
"""

import argparse

import common

from gpt_xp.benchmark.figures import Spread, Workload
from gpt_xp.benchmark.results import Benchmark, ContenderResult, ContenderSpec

FLOAT32 = ("transformers", "CTranslate2 float32", "llama.cpp F32", "llama.cpp F32 flash")
NARROW = ("CTranslate2 int8", "llama.cpp F16", "llama.cpp Q8_0", "llama.cpp Q4_0")
ENGINES = FLOAT32[1:]
FLOOR = {"jax": "XLA's products", "numpy+int8": "int8 products"}  # of other backends it is NumPy's, "floor"
PEERS = (*FLOAT32, *NARROW, *FLOOR.values())
BACKENDS = "numpy,native,native+int8,native+w8a8,native+int4,native+w4a8,jax,torch,cupy,numpy+int8"
# How many times the seconds of others it may take; those of prefill are for long prompts.
TARGETS = {
    ("decode", "numpy"): {"fastest": 1.0, "floor": 1.10},
    ("prefill", "numpy"): {"CTranslate2 float32": 1.0, "floor": 1.15},
    ("decode", "jax"): {"CTranslate2 float32": 1.0},
    ("prefill", "jax"): {"CTranslate2 float32": 1.0},
}
LONG_PROMPT = 512
QUANTIZED = "gpt-xp numpy+int8"
QUANTIZED_TARGETS = {
    "decode": {"gpt-xp numpy": 0.35, "llama.cpp Q8_0": 1.0, "CTranslate2 int8": None, "int8 products": None},
    "prefill": {"gpt-xp numpy": 1.0, "llama.cpp Q8_0": None, "CTranslate2 int8": None, "int8 products": None},
}
NATIVE = "gpt-xp native"
# The phase, which precision of native, to what, and how many times the seconds of that it may take at these contexts.
TARGET_CONTEXTS = (16, 512, 960)
NATIVE_TARGETS = (
    ("decode", "", "fastest", (1.0, 1.0, 1.0)),
    ("prefill", "", "fastest", (1.0, 0.9, 0.9)),
    ("decode", " float16", "llama.cpp F16", (1.0, 1.0, 1.0)),
    ("decode", " float16", NATIVE, (0.5, 0.5, 0.5)),
    ("decode", "+int8", "llama.cpp Q8_0", (0.9, 0.95, 1.0)),
    ("prefill", "+w8a8", "CTranslate2 int8", (1.0, 1.0, 1.0)),
    ("decode", "+int4", "llama.cpp Q4_0", (1.0, 1.0, 1.0)),
    ("decode", "+w4a8", "llama.cpp Q4_0", (1.0, 1.0, 1.0)),
    ("prefill", "+w4a8", "llama.cpp Q4_0", (1.0, 1.0, 1.0)),
    ("decode", "+int4", f"{NATIVE}+int8", (1.0, 1.0, 1.0)),
)
NAIVE = "picoGPT's algorithm"
README_COMMAND = Workload(context=10, n_new=40)  # picoGPT's README: a prompt of 10 tokens, and 40 more
AT_512 = Workload(context=512, n_new=2)


def script() -> None:
    """Run the comparison and print its tables."""
    made = common.parser(__doc__)
    made.add_argument(
        "--contexts", type=common.numbers, default=[16, 512, 960], help="prompt tokens (default: 16,512,960)"
    )
    made.add_argument("--backends", default=BACKENDS, help=f"of gpt-xp (default: {BACKENDS})")
    made.add_argument("--dtypes", default="float32", help="of gpt-xp (default: float32)")
    made.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(common.PEERS)}")
    made.add_argument("--without-naive", action="store_true", help="leave picoGPT's algorithm out, which takes long")
    made.add_argument("--without-floor", action="store_true", help="leave the floor out, which is the CPU's")
    options = made.parse_args()

    found = []
    with common.checkpoint(options) as folder:
        ours = []
        for dtype in options.dtypes.split(","):
            label = "" if dtype == "float32" else f" {dtype}"
            ours += common.own(folder, options.backends.split(","), label, dtype=dtype)
        if "native" in options.backends.split(","):
            ours += common.own(folder, ["native"], " float16", dtype="float16")
        others = common.peers(folder, options.peers.split(","), options)
        specs = [*ours, *others, *([] if options.without_floor else common.floor(folder))]
        found.append(common.run("peers", specs, [Workload(context) for context in options.contexts], options))
        if not options.without_naive and (options.only is None or NAIVE in options.only):
            found.append(against_naive([*ours[:1], *common.peers(folder, [NAIVE], options)], options))
    common.report(options, found, "\n".join(targets(found, options)))


def against_naive(specs: list[ContenderSpec], options: argparse.Namespace) -> Benchmark:
    """Run picoGPT's algorithm on its README's command, and on one token at a context of 512, in fewer rounds."""
    fewer = argparse.Namespace(**{**vars(options), "rounds": min(options.rounds, 5), "plot": None})
    return common.run(NAIVE, specs, [README_COMMAND, AT_512], fewer)


def targets(found: list[Benchmark], options: argparse.Namespace) -> list[str]:
    """Return tables: gpt-xp's backends to the fastest float32 engine and to the floor, and NumPy to the naive."""
    engines = [["float32", "tokens", "to the fastest engine", "to CTranslate2", "to the floor"]]
    for place in range(len(found[0].workloads)):
        for phase in ("decode", "prefill"):
            for backend in ("numpy", "jax", "torch"):
                engines += engine_row(found[0], place, phase, backend)
    parts = [common.show(engines, options)] if len(engines) > 1 else []
    quantized = [["int8", "tokens", *QUANTIZED_TARGETS["decode"]], *quantized_rows(found[0])]
    if len(quantized) > 1:
        parts.append(common.show(quantized, options))
    native = [["native", "tokens", "to", "ratio (quartiles)", ""], *native_rows(found[0])]
    if len(native) > 1:
        parts.append(common.show(native, options))
    naive = [row for each in found[1:] for row in naive_ratios(each)]
    if naive:
        parts.append(common.show([["against picoGPT's algorithm, NumPy", "times as fast", ""], *naive], options))
    return parts


def engine_row(found: Benchmark, place: int, phase: str, backend: str) -> list[list[str]]:
    """Return a row: the ratios to the fastest engine, to CTranslate2 and to the floor; none where it was not run."""
    mine = common.measured(found, f"gpt-xp {backend}")
    first = fastest(found, place, phase)
    if mine is None or first is None:
        return []
    context, limits = found.workloads[place].context, TARGETS.get((phase, backend), {})
    if phase == "prefill" and context < LONG_PROMPT:
        limits = {}
    floor = common.measured(found, FLOOR.get(backend, "floor"))
    others = {"fastest": first, ENGINES[0]: common.measured(found, ENGINES[0]), "floor": floor}
    cells = [cell(mine, other, place, phase, limits.get(kind)) for kind, other in others.items()]
    cells[0] += f" ({first.name})"
    cells[2] += f" ({floor.name})" if backend in FLOOR and floor else ""
    return [[f"{phase}, {backend}", str(context), *cells]]


def quantized_rows(found: Benchmark) -> list[list[str]]:
    """Return the ratios of int8 to gpt-xp's float32 and to other engines' 8 bits."""
    mine = common.measured(found, QUANTIZED)
    if mine is None:
        return []
    return [
        [phase, str(workload.context), *(cell(mine, common.measured(found, name), place, phase, limit)
                                         for name, limit in limits.items())]
        for place, workload in enumerate(found.workloads)
        for phase, limits in QUANTIZED_TARGETS.items()
    ]  # fmt: skip


def native_rows(found: Benchmark) -> list[list[str]]:
    """Return the ratios of native, in each precision, to the engines that compute in it, and to itself."""
    rows = []
    for phase, precision, name, limits in NATIVE_TARGETS:
        mine = common.measured(found, NATIVE + precision)
        for place, workload in enumerate(found.workloads):
            limit = dict(zip(TARGET_CONTEXTS, limits, strict=True)).get(workload.context)
            other = fastest(found, place, phase) if name == "fastest" else common.measured(found, name)
            if mine and other:
                times = common.ratio(common.seconds(mine, place, phase), common.seconds(other, place, phase))
                rows.append([f"{phase}, native{precision}", str(workload.context), other.name, common.as_ratio(times),
                             "" if limit is None else common.verdict(times, limit)])  # fmt: skip
    return rows


def fastest(found: Benchmark, place: int, phase: str) -> ContenderResult | None:
    """Return the fastest float32 engine of those that were measured."""
    engines = [each for name in ENGINES if (each := common.measured(found, name))]
    return min(engines, key=lambda each: getattr(each.figures[place], phase).seconds.median, default=None)


def cell(mine: ContenderResult, other: ContenderResult | None, place: int, phase: str, limit: float | None) -> str:
    """Return a ratio, and whether it meets the target that there may be."""
    if other is None:
        return "-"
    times = common.ratio(common.seconds(mine, place, phase), common.seconds(other, place, phase))
    return common.as_ratio(times) + (f", {common.verdict(times, limit)}" if limit is not None else "")


def naive_ratios(found: Benchmark) -> list[list[str]]:
    """Return how many times as fast gpt-xp is: the whole README command, and one token at 512."""
    naive = common.measured(found, NAIVE)
    mine = next((each for each in found.standings if each.figures and each.name != NAIVE), None)
    if naive is None or mine is None:
        return []

    def whole(standing: ContenderResult, place: int) -> list[float]:
        later = found.workloads[place].n_new - 1
        return [turn.prefill + later * turn.decode for turn in standing.turns[place]]

    command: Spread = common.ratio(whole(naive, 0), whole(mine, 0))
    token: Spread = common.ratio(common.seconds(naive, 1, "decode"), common.seconds(mine, 1, "decode"))
    kinds = (("its README's command: 10 tokens, and 40 more", command, 5), ("one token at 512", token, 30))
    return [[what, common.as_ratio(times), common.verdict(times, least, at_least=True)] for what, times, least in kinds]


if __name__ == "__main__":
    common.main(script)
