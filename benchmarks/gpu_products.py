"""Measure how fast the products of a decode step read their weights on a GPU, by each kernel that can compute them.

    python benchmarks/gpu_products.py --size 124M

It measures each matrix of a model, in float32 and float16, with 1 and 8 rows. `thin` is the kernel in use, `split` the
prepared one (`GPT_XP_CUPY_KERNELS=split`), and `cuBLASLt` NVIDIA's library, if nvmath-python is installed (`pip install
nvmath-python`). All are compared with float64 first. They are captured in a CUDA graph, as in a step, over so many
copies of the matrix that the GPU's cache cannot hold them. Times are medians of 15 replays. "of a copy" is the fraction
of the bandwidth that a copy of 4 GB reaches, read and written. This script has not been run on a GPU yet.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from gpt_xp_backends.cupy_backend.kernels.products import split_matmul, thin_matmul

import gpt_xp
from gpt_xp.reporting.text import table
from gpt_xp.tolerances import TOLERANCE

REPLAYS = 15
CACHED = 300_000_000  # bytes: several times the cache of an H100
ALLOWED = {"float32": 20 * TOLERANCE["same", "float32"], "float16": TOLERANCE["layer", "float16"]}
Matmul = Callable[[Any, Any], Any]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=list(gpt_xp.SIZES))
    config = gpt_xp.SIZES[parser.parse_args().size]
    try:
        import cupy

        cupy.zeros(1)
    except Exception as error:  # no CuPy, no driver, no GPU
        sys.exit(f"CuPy cannot be used here: {error}")

    copied = bandwidth(cupy)
    print(f"a copy reads and writes {copied / 1e9:.0f} GB/s")
    ways = matmuls(cupy)
    n = config.n_embd
    rows = [["", "dtype", "rows", *(f"{name} us" for name in ways), *(f"{name} of a copy" for name in ways)]]
    for name, n_in, n_out in (
        ("c_attn", n, 3 * n), ("attn c_proj", n, n), ("c_fc", n, 4 * n), ("mlp c_proj", 4 * n, n),
        ("logits", n, config.n_vocab),
    ):  # fmt: skip
        for dtype in ALLOWED:
            weights = copies(cupy, n_in, n_out, dtype, transposed=name == "logits")
            for n_rows in (1, 8):
                x = cupy.asarray(np.random.default_rng(0).standard_normal((n_rows, n_in)), dtype=dtype)
                seconds = [measure(cupy, matmul, x, weights) for matmul in ways.values()]
                speeds = [weights[0].nbytes / each / copied for each in seconds]
                rows.append([name, dtype, str(n_rows), *(f"{1e6 * each:.1f}" for each in seconds),
                             *(f"{each:.2f}" for each in speeds)])  # fmt: skip
    print(table(rows), end="")


def matmuls(cupy: Any) -> dict[str, Matmul]:
    """Return the ways to multiply, by name."""
    split = split_matmul(cupy)

    def summed(x: Any, w: Any) -> Any:
        product = split(x, w)
        return sum(product[1:], product[0]).astype(x.dtype) if isinstance(product, list) else product

    ways: dict[str, Matmul] = {"thin": thin_matmul(cupy), "split": split}
    exact = {"split": summed}
    try:
        from contenders.cublaslt import lt_matmul

        ways["cuBLASLt"] = lt_matmul(cupy)
    except ImportError as error:
        print(f"cuBLASLt: skipped, {error}", file=sys.stderr)
    for name, matmul in ways.items():
        check(cupy, name, exact.get(name, matmul))
    return ways


def check(cupy: Any, name: str, matmul: Matmul) -> None:
    """Raise `SystemExit` if a way to multiply is wrong."""
    random = np.random.default_rng(1)
    for dtype, allowed in ALLOWED.items():
        x, w = (random.standard_normal(shape).astype(dtype) for shape in ((3, 768), (768, 2304)))
        table_ = random.standard_normal((5003, 768)).astype(dtype).T
        for right in (w, table_):
            product = cupy.asnumpy(
                matmul(cupy.asarray(x), cupy.asarray(right.T).T if right is table_ else cupy.asarray(w))
            )
            expected = x.astype(np.float64) @ right.astype(np.float64)
            error = np.abs(product - expected).max() / np.abs(expected).max()
            if not error <= allowed:
                sys.exit(f"{name} in {dtype} is off by {error:.1e} of the largest, and {allowed:.0e} is allowed")


def copies(cupy: Any, n_in: int, n_out: int, dtype: str, transposed: bool) -> list[Any]:
    """Return copies of a random matrix [n_in, n_out], more than the cache holds."""
    shape = (n_out, n_in) if transposed else (n_in, n_out)
    first = cupy.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(dtype))
    made = [first, *(first.copy() for _ in range(1 + CACHED // first.nbytes))]
    return [each.T for each in made] if transposed else made


def measure(cupy: Any, matmul: Matmul, x: Any, weights: list[Any]) -> float:
    """Return the seconds of one product, replayed in a graph without gaps."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        matmul(x, weights[0])
        stream.synchronize()
        stream.begin_capture()
        for w in weights:
            matmul(x, w)
        graph = stream.end_capture()
        graph.launch(stream)
        return median_seconds(cupy, stream, lambda: graph.launch(stream)) / len(weights)


def bandwidth(cupy: Any) -> float:
    """Return the bytes a second that a copy of 4 GB reads and writes."""
    source, target = cupy.ones(2**30, dtype=cupy.float32), cupy.empty(2**30, dtype=cupy.float32)
    stream = cupy.cuda.get_current_stream()
    return 2 * source.nbytes / median_seconds(cupy, stream, lambda: cupy.copyto(target, source))


def median_seconds(cupy: Any, stream: Any, run: Callable[[], object]) -> float:
    """Return the median by events of the device."""
    times = []
    for _ in range(REPLAYS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
