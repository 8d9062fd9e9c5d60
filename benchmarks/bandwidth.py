"""Measure the memory bandwidth of a CUDA GPU, and the time to read a model's weights: no decode step can be faster.

    python benchmarks/bandwidth.py --size 124M

It is measured with torch, as the fastest of several sums over 1 GB, which only reads.
"""

import argparse
import sys
import time

import gpt_xp

N_BYTES = 2**30
TRIALS = 20


def main() -> None:
    """Print a line for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=list(gpt_xp.SIZES))
    config = gpt_xp.SIZES[parser.parse_args().size]
    bandwidth = measure()
    # All weights but the position table, of which a token reads one row.
    n_weights = config.n_params - config.n_ctx * config.n_embd
    print(f"    measured bandwidth: {bandwidth / 1e9:.0f} GB/s")
    for dtype, size in (("float32", 4), ("float16", 2)):
        print(f"    weights in {dtype}: {1e3 * size * n_weights / bandwidth:.3f} ms a token")


def measure() -> float:
    """Return bytes per second."""
    try:
        import torch
    except ModuleNotFoundError as error:
        sys.exit(f"torch measures the bandwidth: {error}")

    x = torch.ones(N_BYTES // 4, device="cuda")
    best = float("inf")
    for _ in range(TRIALS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        x.sum()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return N_BYTES / best


if __name__ == "__main__":
    main()
