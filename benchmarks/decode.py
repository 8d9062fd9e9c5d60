"""How fast gpt-xp decodes on NumPy, beside what the machine can do and beside transformers.

    pip install -e '.[dev,oracle]'
    python benchmarks/decode.py --threads 2

A model of 124M shape with random weights, float32, read from a file laid out like the published one; 512 tokens of
context. Several ways of one step, taken in turn (A B C A B C ..., a few steps each), medians of one run:

- floor: the bare matrix-vector products over the same weights, and one read of the cache's keys and values;
- gpt-xp: one decode step, from token ids to the choice of the next token, greedy or sampled (top-k 40, top-p 0.95);
- transformers: one step of GPT2LMHeadModel with its cache on torch, same weights, same threads (skipped if missing).

Before timing, the logits of gpt-xp and transformers are compared.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=["124M"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jax", action="store_true", help="time the JAX backend too (its threads disturb the others)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    os.environ |= dict.fromkeys(
        ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(options.threads)
    )

    import numpy as np
    from shapes import published_params

    import gpt_xp

    config = gpt_xp.SIZES[options.size]
    params = published_params(config)
    prompt = np.random.default_rng(1).integers(0, config.n_vocab, options.context - options.steps // 2).tolist()
    contenders = {
        "floor": floor(params, config, options.context),
        "gpt-xp numpy greedy": gpt_xp_step(params, config, prompt),
        "gpt-xp numpy sampled": gpt_xp_step(params, config, prompt, temperature=0.8, top_k=40, top_p=0.95),
    }
    if options.jax:
        contenders["gpt-xp jax greedy"] = gpt_xp_step(params, config, prompt, backend="jax")
    try:
        contenders["transformers"] = transformers_step(params, config, prompt, options.threads)
    except ImportError as error:
        print(f"transformers skipped: {error}")
    times = interleave(contenders, options.steps)
    report(times, options)


def floor(params: Any, config: Any, context: int) -> Callable[[], object]:
    """Every weight matrix times one vector, and every key and value of the cache once."""
    import numpy as np

    matrices = [params["wte"].T]
    for block in params["blocks"]:
        matrices += [block[part][name]["w"] for part, name in PRODUCTS]
    rng = np.random.default_rng(2)
    vectors = [rng.standard_normal((1, m.shape[0]), dtype=np.float32) for m in matrices]
    # The reads are products too: of one query with the keys, of one row of weights with the values.
    d_head = config.n_embd // config.n_head
    cache = rng.standard_normal((2 * config.n_layer, config.n_head, context, d_head), dtype=np.float32)
    query = rng.standard_normal((d_head, 1), dtype=np.float32)

    def run() -> None:
        for vector, matrix in zip(vectors, matrices, strict=True):
            vector @ matrix
        for layer in cache:
            layer @ query

    return run


TURN = 5  # steps of one contender before the next has its turn
PRODUCTS = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))


def gpt_xp_step(
    params: Any, config: Any, prompt: list[int], backend: str = "numpy", **options: Any
) -> Callable[[], object]:
    """One step of a running generation."""
    import gpt_xp

    model = gpt_xp.Model(params, config, backend=backend)
    stream = model.stream(prompt, max_tokens=None, seed=1, **options)
    return lambda: next(stream)


def transformers_step(params: Any, config: Any, prompt: list[int], threads: int) -> Callable[[], object]:
    """One greedy step of transformers' GPT-2 with its default cache."""
    import torch
    from shapes import transformers_model

    import gpt_xp

    torch.set_num_threads(threads)
    model = transformers_model(params, config)
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True)
        logits = gpt_xp.Model(params, config).logits(prompt)
        worst = float((output.logits[0] - torch.tensor(logits)).abs().max() / output.logits.abs().max())
    assert worst < 2e-5, f"logits differ by {worst:.1e} of the largest"
    state = {"cache": output.past_key_values, "token": output.logits[:, -1:].argmax(-1)}

    @torch.inference_mode()
    def run() -> None:
        output = model(state["token"], past_key_values=state["cache"], use_cache=True)
        state["cache"], state["token"] = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return run


def interleave(contenders: dict[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Run the contenders in turn, a few steps each as decoding does, and return the milliseconds of each step.

    The first step of a turn is not counted: the threads and the caches are still the last contender's.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(steps // TURN):
        for name, run in contenders.items():
            for step in range(TURN):
                begin = time.perf_counter()
                run()
                if step:
                    times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def report(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians, the middle half, and ratios to the floor and to gpt-xp."""
    import numpy as np

    medians = {name: statistics.median(ms) for name, ms in times.items()}
    figures = {
        name: {
            "median_ms": round(medians[name], 2),
            "quartiles_ms": [round(q, 2) for q in statistics.quantiles(ms, n=4)[::2]],
            "ratio_to_floor": round(medians[name] / medians["floor"], 3),
            "ratio_to_gpt_xp": round(medians[name] / medians["gpt-xp numpy greedy"], 3),
        }
        for name, ms in times.items()
    }
    if options.json:
        print(json.dumps({"options": vars(options), "figures": figures}, indent=1))
        return
    machine = f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"decode, {options.size} shape, context about {options.context}, {options.threads} threads; {machine}")
    print(f"{'':22} {'median ms':>10} {'quartiles':>15} {'x floor':>8} {'x gpt-xp':>9}")
    for name, row in figures.items():
        low, high = row["quartiles_ms"]
        print(f"{name:22} {row['median_ms']:10.2f} {low:7.2f} {high:7.2f} {row['ratio_to_floor']:8.2f} "
              f"{row['ratio_to_gpt_xp']:9.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
