"""Measure the time of a prompt of 16 to 960 tokens, up to the choice of the first token.

    python benchmarks/prefill.py --plot benchmarks/results/prefill-124M.png

gpt-xp on NumPy, JAX and PyTorch and, if they are installed (benchmarks/requirements.txt), transformers, CTranslate2 and
llama.cpp, all in float32, are compared with the floor: the matrix products alone, over the same weights. The model has
random weights of a published shape, read from a file laid out like the published ones. They take turns, A B A B.
"""

import common

from gpt_xp.benchmark.figures import Workload

FLOAT32 = ("transformers", "CTranslate2 float32", "llama.cpp F32 flash")


def script() -> None:
    """Run the sweep and print its table."""
    made = common.parser(__doc__, rounds=5)
    made.add_argument("--contexts", type=common.numbers, default=[16, 64, 128, 256, 512, 768, 960])
    made.add_argument("--backends", default="numpy,jax,torch", help="of gpt-xp (default: numpy,jax,torch)")
    options = made.parse_args()

    with common.checkpoint(options) as folder:
        others = common.peers(folder, FLOAT32, options)
        specs = [*common.own(folder, options.backends.split(",")), *others, *common.floor(folder)]
        found = common.run("prefill", specs, [Workload(context, n_new=8) for context in options.contexts], options)
    common.report(options, [found])


if __name__ == "__main__":
    common.main(script)
