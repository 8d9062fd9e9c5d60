"""Show how far apart array libraries are: each from float64, and each from each other.

    pip install -e '.[jax,torch,mlx,strict]'
    python benchmarks/agreement.py > agreement.md

It runs the bundled model, and a model of 124M's shape whose activations are as large as those of the trained one, on
every library that is installed, in every dtype that it computes in. Each runs in its own process. Where there is a
CUDA GPU, it also runs there, and with TF32 products, which gpt-xp never uses. Prints a page in Markdown, with the date.
"""

import argparse
import contextlib
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shapes import trained_size_params, write_published

import gpt_xp
from gpt_xp.benchmark.machine import describe_machine
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.comparison.driver import ProcessOutput, run_all
from gpt_xp.comparison.figures import layer_names
from gpt_xp.comparison.job import PROMPTS
from gpt_xp.comparison.results import BackendResult
from gpt_xp.hub.find import find_model
from gpt_xp.processes import JAX_VARIABLES, thread_variables
from gpt_xp.reporting.text import markdown_table
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tolerances import TOLERANCE

DTYPES = ("float32", "float64", "bfloat16", "float16")
TF32 = Path(__file__).with_name("tf32")
ON_CUDA = ("cupy", "jax@gpu", "torch@cuda")
WITH_TF32 = ("cupy-tf32", "jax-tf32@gpu", "torch-tf32@cuda")
HEAD = (
    "library", "version", "device", "dtype", "error of the logits", "of the allowed", "worst layer", "same tokens",
    "same texts",
)  # fmt: skip
EXPLANATION = """\
Every library sums products in its own order, and computes `exp` and `tanh` in its own way. So the same forward pass on
the same weights gives other numbers. "Identical across backends" can only mean: equal within the rounding of the dtype.
This page shows how much that is.

- **error of the logits**: the largest difference from NumPy in float64, divided by the largest logit.
- **of the allowed**: this error, divided by gpt-xp's tolerance of the dtype (`gpt_xp/tolerances.py`).
- **worst layer**: the layer whose error is the largest part of what is allowed at its depth, with the error.
- **same tokens**: of the tokens that are chosen greedily after the text of float64, how many equal its own.
- **same texts**: of the texts that are generated greedily, how many equal those of float64 to the end. A text that
  differs in one token goes on differently.
"""


@dataclass(frozen=True)
class Run:
    """One library in one dtype: its record, and its logits at all positions of all prompts."""

    result: BackendResult
    logits: tuple[Any, ...]


def main() -> None:
    """Run the comparisons and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", help="names with commas between (default: all that are installed)")
    parser.add_argument("--only", choices=["shakespeare", "124M"], help="one of the two models")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens to generate from each prompt (default: 32)")
    parser.add_argument("--threads", type=int, help="threads of each library (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="the bundled model, one prompt, and 4 tokens: a trial")
    options = parser.parse_args()
    if options.quick:
        options.only, options.max_tokens = "shakespeare", 4
    os.environ.update(JAX_VARIABLES | thread_variables(options.threads))  # Not the job's `threads`, which MLX refuses.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TF32), os.environ.get("PYTHONPATH")]))
    has_cuda = any(device.name.startswith(("cuda", "gpu")) for info in gpt_xp.backends() for device in info.devices)
    backends = options.backends.split(",") if options.backends else installed(has_cuda)
    machine, command = describe_machine(), shlex.join(["python", "benchmarks/agreement.py", *sys.argv[1:]])
    print(f"# How far apart array libraries are\n\n{EXPLANATION}")
    print(
        f"Made by `{command}` on {machine['date']}: gpt-xp {machine['gpt_xp']}, Python "
        f"{machine['python']}, {machine['system']}, {machine['cpu']}, {machine['cores']} cores.\n"
    )
    if not has_cuda:
        print("No GPU has run yet: all rows are of CPUs, and rows with TF32 are left out, which only GPUs have.\n")
    if options.only != "124M":
        model("The bundled model", find_model("shakespeare"), backends, options)
    if options.only != "shakespeare":
        with tempfile.TemporaryDirectory() as folder:
            config = gpt_xp.SIZES["124M"]
            write_published(Path(folder), config, trained_size_params(config))
            title = "124M's shape, random weights, with activations as large as those of the trained model"
            model(title, Path(folder), backends, options)


def installed(has_cuda: bool) -> list[str]:
    """Return the names of the libraries that can be used here; on a GPU those of the GPU, and those with TF32."""
    usable = [info.name for info in gpt_xp.backends() if not info.problem and not info.name.endswith("-tf32")]
    if not has_cuda:
        return usable
    gpu = [name for name in (*ON_CUDA, *WITH_TF32) if name.partition("@")[0].removesuffix("-tf32") in usable]
    return [name if name not in ("jax", "torch") else f"{name}@cpu" for name in usable if name != "cupy"] + gpu


def model(title: str, folder: Path, backends: Sequence[str], options: argparse.Namespace) -> None:
    """Compare the libraries on one model, and print its part of the page."""
    config, tokenizer, max_tokens = read_config(folder), Tokenizer.from_directory(folder), options.max_tokens
    texts = PROMPTS[:1] if options.quick else PROMPTS
    prompts = [tokenizer.encode(text)[: config.n_ctx - max_tokens] for text in texts]
    job = {"model": str(folder), "prompts": prompts, "max_tokens": max_tokens, "seed": 0, "threads": None}
    largest: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gpt-xp-agreement-") as temporary:

        def keep(result: BackendResult, outcome: ProcessOutput, reference: ProcessOutput) -> Run:
            if not largest:
                largest.extend(np.max([np.abs(each).max(axis=(1, 2)) for each in reference.arrays("layers")], axis=0))
                largest.append(max(float(np.abs(each).max()) for each in reference.arrays("logits")))
            return Run(result, tuple(map(np.array, outcome.arrays("logits"))) if result.figures else ())

        reference, runs = run_all(Path(temporary), backends, DTYPES, job, progress, keep)
    n_tokens = sum(map(len, prompts))
    print(f"## {title}\n\n{config.n_params / 1e6:.1f}M params, {n_tokens} tokens in "
          f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, "
          f"{max_tokens} generated from each. The reference is NumPy {reference.version} in float64.\n")  # fmt: skip
    print(markdown_table([HEAD, *filter(None, map(row, runs))]))
    print("Each from each other: the largest difference of the logits, divided by the largest logit.\n")
    for dtype in DTYPES:
        those = [run for run in runs if run.logits and run.result.dtype == dtype]
        if len(those) > 1:
            print(markdown_table(list(pairs(dtype, those))))
    print("The largest activation after each layer, and the largest logit:\n")
    names = [name.removeprefix("block ") for name in layer_names(config.n_layer)]
    print(markdown_table([("layer", *names, "logits"), ("largest", *(f"{each:.4g}" for each in largest))]))
    print("Settings:\n")
    for run in runs:
        if run.result.figures and run.result.dtype == "float32":
            settings = ", ".join(f"{key} {value}" for key, value in run.result.settings.items())
            print(f"- {run.result.backend}: {settings or 'none'}")
    print()


def row(run: Run) -> tuple[str, ...] | None:
    """Return the line of a run in the table; None for a dtype in which the library does not compute."""
    result, figures = run.result, run.result.figures
    if result.skipped:
        return None
    if figures is None:
        return (result.backend, "", "", result.dtype, f"failed: {'; '.join(result.problems)}", "", "", "", "")
    error = figures.logits.difference.relative
    worst = max(figures.layers, key=lambda layer: layer.difference.relative / layer.allowed)
    greedy = figures.tokens.get("greedy")
    texts = ("-", "-")  # It could not generate: its logits were not finite.
    if greedy is not None:
        whole = greedy.shared.count(greedy.length)
        texts = (f"{greedy.n_tokens - len(greedy.flips)} of {greedy.n_tokens}", f"{whole} of {len(greedy.shared)}")
    return (
        result.backend, str(result.version), str(result.device), result.dtype, f"{error:.1e}" if error else "0",
        f"{error / TOLERANCE['logits', result.dtype]:.2g}",
        f"{worst.name} ({worst.difference.relative:.1e})" if worst.difference.relative else "-", *texts,
    )  # fmt: skip


def pairs(dtype: str, runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of all pairs of libraries in one dtype."""
    yield (dtype, *(run.result.backend for run in runs[:-1]))
    for i, run in enumerate(runs[1:], 1):
        others = (distance(run, other) for other in runs[:i])
        yield (run.result.backend, *itertools.islice(itertools.chain(others, itertools.repeat("")), len(runs) - 1))


def distance(a: Run, b: Run) -> str:
    """Return the largest difference of the logits of two runs, as text."""
    largest = np.max([np.abs(each).max() for each in b.logits])
    error = np.max([np.abs(np.float64(x) - y).max() for x, y in zip(a.logits, b.logits, strict=True)])
    if not np.isfinite(error / largest):
        return "not finite"
    return "the same bits" if error == 0 else f"{error / largest:.1e}"


@contextlib.contextmanager
def progress(stage: str) -> Iterator[None]:
    """Write the name of what runs to stderr."""
    print(stage, file=sys.stderr)
    yield


if __name__ == "__main__":
    main()
