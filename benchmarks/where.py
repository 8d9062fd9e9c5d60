"""Measure where gpt-xp on NumPy spends its time: milliseconds in each function of transformer.py.

    python benchmarks/where.py --threads 2 [--quantize int8]

It takes a model of 124M's shape with random weights, float32 or quantized. It prints two tables: for prefill of a
prompt, and for a greedy step of decode after it. They show medians of the time inside each function. The time includes
the functions that it calls, so `attention` includes `softmax`. Reading the clock some hundred times a step adds a few
percent. The first lines show the time with and without that.
"""

import argparse
import functools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

FUNCTIONS = ("linear", "attention", "softmax", "gelu", "layer_norm", "embed", "unembed")


def main() -> None:
    """Run and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    options = parser.parse_args()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)

    import numpy as np
    from shapes import published_params

    import gpt_xp
    from gpt_xp import transformer as model
    from gpt_xp.generation import step_functions as steps
    from gpt_xp.generation.choosing import Choosing
    from gpt_xp.kv_cache import LayerCache

    config = gpt_xp.SIZES["124M"]
    params = published_params(config)
    if options.quantize:
        params = gpt_xp.quantize(params, options.quantize)
    prompt = np.random.default_rng(0).integers(0, config.n_vocab, options.context).tolist()
    plain = [*turns(gpt_xp.Model(params, config, backend="numpy"), prompt, options.runs)]

    spent: dict[str, float] = defaultdict(float)
    for name in FUNCTIONS:
        setattr(model, name, timed(getattr(model, name), spent))
    steps.unembed = model.unembed  # type: ignore[attr-defined]
    LayerCache.append = timed(LayerCache.append, spent)  # type: ignore[method-assign]
    Choosing.choose = timed(Choosing.choose, spent)  # type: ignore[method-assign]
    engine = gpt_xp.Model(params, config, backend="numpy")
    watched = [(*seconds, parts) for *seconds, parts in turns(engine, prompt, options.runs, spent)]
    for phase, title in enumerate(("prefill", "decode")):
        print(
            f"\n{title}, {options.context} tokens of context, {options.threads} threads, milliseconds"
            + (f", {options.quantize}" if options.quantize else "")
        )
        print(f"  {'whole':20} {1e3 * statistics.median(turn[phase] for turn in plain):8.2f}")
        print(f"  {'whole, while watched':20} {1e3 * statistics.median(turn[phase] for turn in watched):8.2f}")
        for name in watched[0][2][phase]:
            print(f"    {name:18} {1e3 * statistics.median(turn[2][phase][name] for turn in watched):8.2f}")


def turns(model: Any, prompt: list[int], runs: int, spent: Any = None) -> Iterator[tuple[float, float, Any]]:
    """Yield the seconds of prefill and of the sixth decode step, and what was spent in each function."""
    for _ in range(runs):
        stream = model.stream(prompt, max_tokens=None)
        first, parts = once(stream.__next__, spent)
        for _ in range(5):
            next(stream)
        later, more = once(stream.__next__, spent)
        yield first, later, (parts, more)


def once(call: Callable[[], object], spent: Any) -> tuple[float, dict[str, float]]:
    """Return the seconds of one call, and what was spent in each function."""
    if spent is not None:
        spent.clear()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin, dict(spent or {})


def timed(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """Return the function, adding up its seconds under its name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[function.__name__] += time.perf_counter() - begin

    return call


if __name__ == "__main__":
    main()
