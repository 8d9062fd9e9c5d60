"""Check each library on a GPU against NumPy in float64, within a few minutes.

    python benchmarks/gpu_smoke.py
    python benchmarks/gpu_smoke.py --backends cupy --dtypes float32

It runs the bundled model on each library that is installed, in each dtype that README offers. A line for each check
says "ok" or "FAILED" with the result. After a check that fails, the others still run, and the exit code is then 1.
Tokens may differ where the reference has two that are tied within the rounding of the dtype.
"""

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
from gpt_xp_backends.cupy_backend.adapter import KERNELS

import gpt_xp
from gpt_xp.errors import GptXpError
from gpt_xp.tolerances import TOLERANCE

MODEL = "shakespeare"
PROMPT = "ROMEO:\n"
UNEVEN = ["ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "A"]
BACKENDS = {
    "cupy": ("float32", "float64", "float16"),
    "jax@gpu": ("float32", "float64", "bfloat16", "float16"),
    "torch@cuda": ("float32", "float64", "bfloat16", "float16"),
}
GENERATIONS = 100
GROWTH = 4e6  # bytes of the device that may be lost by then; memory is given to a process in steps of 2 MB


@dataclass
class Report:
    """Counts the checks, and prints a line for each."""

    began: float = field(default_factory=time.perf_counter)
    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def say(self, *words: object) -> None:
        """Print a line with the seconds since the beginning."""
        print(f"[{time.perf_counter() - self.began:6.1f} s]", *words, flush=True)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """Print whether the check inside succeeded, with its figures, and continue in any case."""
        found: list[str] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
            problem = None
        except Exception as error:
            problem = error
        for each in caught:
            if problem is None:
                problem = each.message if isinstance(each.message, Exception) else RuntimeWarning(str(each.message))
        if problem is None:
            self.passed += 1
        else:
            self.failed.append(name)
            if not isinstance(problem, GptXpError):  # Those say it all in a line.
                traceback.print_exception(problem, file=sys.stdout)  # with its cause
        self.say("ok    " if problem is None else "FAILED", f"{name}:", "; ".join(found) or str(problem))


class Reference:
    """Return the texts and logits of NumPy in float64."""

    def __init__(self) -> None:
        self.model = gpt_xp.load(MODEL, backend="numpy", dtype="float64")
        self._made: dict[Any, list[gpt_xp.Generation]] = {}
        self.tokens = self.model.tokenizer.encode(PROMPT) + self.texts(PROMPT)[0].token_ids[:-1]
        self.logits = self.model.logits(self.tokens)

    def texts(self, prompts: Any, **options: Any) -> list[gpt_xp.Generation]:
        """Return the generations of a prompt or of several."""
        key = str(prompts), str(sorted(options.items()))
        if key not in self._made:
            self._made[key] = generations(self.model, prompts, **options)
        return self._made[key]

    def compare(self, model: gpt_xp.Model, prompts: Any, **options: Any) -> str:
        """Return how far a model's texts are those of the reference. Raises `AssertionError` where they are not."""
        dtype = model.backend.dtype
        tie = 2 * TOLERANCE["logits", dtype] * float(np.abs(self.logits).max())
        counts = []
        for ours, theirs in zip(generations(model, prompts, **options), self.texts(prompts, **options), strict=True):
            pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
            n = next((place for place, (one, other) in enumerate(pairs) if one != other), len(theirs.token_ids))
            counts.append(f"{n} of {len(theirs.token_ids)} tokens")
            if n < len(theirs.token_ids):
                counts[-1] += f" (then a margin of {theirs.margins[n]:.1e})"
                assert theirs.margins[n] <= tie, f"{counts[-1]}, where rounding explains {tie:.1e}"
        return ", ".join(counts)


def generations(model: gpt_xp.Model, prompts: Any, **options: Any) -> list[gpt_xp.Generation]:
    """Return the generations of a model for the prompts."""
    out = model.generate(prompts, **{"max_tokens": 48, "ignore_eos": True, **options})
    return [out] if isinstance(out, gpt_xp.Generation) else out


def load(backend: str, dtype: str) -> gpt_xp.Model:
    """Return the model on a backend like "torch@cuda"."""
    name, _, device = backend.partition("@")
    return gpt_xp.load(MODEL, backend=name, device=device or None, dtype=dtype)


def loaded(report: Report, backend: str, dtype: str) -> gpt_xp.Model | None:
    """Return the model, or None where it cannot be loaded."""
    with report.check(f"{backend} {dtype}, loading") as found:
        model = load(backend, dtype)
        found.append(model.backend.device)
        return model
    return None


def texts(report: Report, reference: Reference, model: gpt_xp.Model, name: str) -> None:
    """Check greedy text and logits, and CuPy's verdict on its graph."""
    dtype = model.backend.dtype
    with report.check(f"{name}, logits") as found:
        error = np.abs(model.logits(reference.tokens).astype(np.float64) - reference.logits).max()
        error /= np.abs(reference.logits).max()
        found.append(f"logits off by {error:.1e} of the largest")
        assert error <= TOLERANCE["logits", dtype], f"{found[-1]}, more than {TOLERANCE['logits', dtype]:.0e}"
    with report.check(f"{name}, text") as found:
        found.append(reference.compare(model, PROMPT))
        found.append(f"again {reference.compare(model, PROMPT)}")
    with report.check(f"{name}, settings") as found:
        found += [f"{key} {value}" for key, value in model.backend.settings().items()]
        check_graph(model, found)


def check_graph(model: gpt_xp.Model, found: list[str]) -> None:
    """Record the state of CuPy's graph. Raises `AssertionError` if it is not used."""
    verdict = model.backend.settings().get("cuda_graph")
    if verdict is not None:
        found.append(f"graph: {verdict}")
        assert verdict == "yes", found[-1]


def shapes(report: Report, reference: Reference, model: gpt_xp.Model, name: str) -> None:
    """Check batches, a batch that outruns the context, sampling, and caches of different sizes one after another."""
    with report.check(f"{name}, a batch") as found:
        found.append(reference.compare(model, UNEVEN))
        check_graph(model, found)
    with report.check(f"{name}, rows longer than the context: the cache is a ring") as found:
        found.append(reference.compare(model, UNEVEN, max_tokens=None))
    with report.check(f"{name}, sampled") as found:
        options: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 3, "repetition_penalty": 1.1}
        found.append(reference.compare(model, PROMPT, **options))
    with report.check(f"{name}, another size of the cache each time") as found:
        for prompts, max_tokens in ((PROMPT, 9), (PROMPT, 200), (UNEVEN, 9), (PROMPT, 9), (PROMPT, 200)):
            found.append(reference.compare(model, prompts, max_tokens=max_tokens))
            check_graph(model, found)


def kernels(report: Report, reference: Reference, dtype: str) -> None:
    """Check the optional kernels of CuPy, each alone and all together."""
    for names in (*KERNELS, "all"):
        with report.check(f"cupy {dtype}, prepared kernels: {names}") as found:
            with patch.dict(os.environ, GPT_XP_CUPY_KERNELS=names):
                model = load("cupy", dtype)
            found += [reference.compare(model, PROMPT), reference.compare(model, UNEVEN, max_tokens=None)]
            check_graph(model, found)


def memory(report: Report, model: gpt_xp.Model, name: str, used: Callable[[], int]) -> None:
    """Check that many generations, with a cache of another size each time, take no more memory than a few."""
    with report.check(f"{name}, memory of the device over {GENERATIONS} generations") as found:
        taken = []
        for number in range(GENERATIONS):
            model.generate([PROMPT] * (1 + number % 2), max_tokens=140, ignore_eos=True)
            if number % 20 == 19:
                gc.collect()
                taken.append(used())
        found.append("MB " + ", ".join(f"{each / 1e6:.1f}" for each in taken))
        assert taken[-1] - taken[0] <= GROWTH, f"it grows: {found[-1]}"


def used_by_cupy() -> int:
    """Return the bytes of the device that are not free, after CuPy has given back what it keeps."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def used_by_jax() -> int:
    """Return the bytes that JAX's arrays take."""
    import jax

    return int((jax.devices()[0].memory_stats() or {"bytes_in_use": 0})["bytes_in_use"])


def used_by_torch() -> int:
    """Return the bytes that PyTorch's arrays take."""
    import torch

    return int(torch.cuda.memory_allocated())


USED = {"cupy": used_by_cupy, "jax": used_by_jax, "torch": used_by_torch}


def command(report: Report, reference: Reference, backend: str) -> None:
    """Check what the command prints."""
    name, _, device = backend.partition("@")
    with report.check(f"gpt-xp --backend {name}") as found:
        arguments = ["--backend", name, *(["--device", device] if device else []), "-m", MODEL, "-n", "40", "--stats"]
        done = subprocess.run(
            [sys.executable, "-m", "gpt_xp", *arguments, PROMPT],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found += [repr(done.stdout[:40]), " ".join(done.stderr.split())]
        assert done.stdout.strip() == reference.texts(PROMPT, max_tokens=40, ignore_eos=False)[0].text.strip()


def main() -> None:
    """Run all checks and say how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", help=f'with commas between, "@" before a device (default: {",".join(BACKENDS)})')
    parser.add_argument("--dtypes", help="with commas between (default: all that README offers)")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the libraries share the GPU

    report = Report()
    for info in gpt_xp.backends():
        devices = ", ".join(f"{device.name}: {device.kind}" for device in info.devices)
        report.say(info.name, *filter(None, (info.version, devices, info.problem)))
    reference = Reference()
    report.say("NumPy in float64:", repr(reference.texts(PROMPT)[0].text[:70]))
    for backend in options.backends.split(",") if options.backends else installed(report):
        name = backend.partition("@")[0]
        dtypes = options.dtypes.split(",") if options.dtypes else BACKENDS.get(backend, ("float32",))
        models = [each for dtype in dtypes if (each := loaded(report, backend, dtype))]
        for model in models:
            texts(report, reference, model, f"{backend} {model.backend.dtype}")
        for model in models[:1]:
            shapes(report, reference, model, f"{backend} {model.backend.dtype}")
            if name in USED and not backend.endswith("@cpu"):
                memory(report, model, backend, USED[name])
            command(report, reference, backend)
        for model in models if name == "cupy" else ():
            kernels(report, reference, model.backend.dtype)
    for name in report.failed:
        report.say("FAILED", name)
    report.say(f"{report.passed} checks passed, {len(report.failed)} failed")
    if not (report.passed or report.failed):
        report.say("there was nothing to check: no library for GPUs is installed")
    sys.exit(1 if report.failed or not report.passed else 0)


def installed(report: Report) -> list[str]:
    """Return the backends whose library is installed; those that find no GPU will fail."""
    found = [backend for backend in BACKENDS if find_spec(backend.partition("@")[0])]
    for backend in BACKENDS.keys() - set(found):
        report.say(f"{backend}: left out, it is not installed")
    return found


if __name__ == "__main__":
    main()
