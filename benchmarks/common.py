"""Code that the benchmark scripts share: options, the model, the contenders, and the output."""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shapes import write_published

import gpt_xp
from gpt_xp.benchmark.driver import run_benchmark
from gpt_xp.benchmark.figures import Spread, Workload, spread
from gpt_xp.benchmark.machine import usable_cores
from gpt_xp.benchmark.models import floor_spec, gpt_xp_spec
from gpt_xp.benchmark.plot import save_plot
from gpt_xp.benchmark.report import as_markdown, as_text
from gpt_xp.benchmark.results import Benchmark, ContenderResult, ContenderSpec
from gpt_xp.errors import GptXpError
from gpt_xp.processes import failure_reason, usable_backends
from gpt_xp.reporting.plots import check_plot
from gpt_xp.reporting.text import markdown_table, table

# By name: the module in `contenders`, its dtype, and the allowed difference of its logits to float32, relative to the
# largest logit (None: as in `gpt_xp.tolerances`).
PEERS = {
    "transformers": ("transformers", "float32", None),
    "CTranslate2 float32": ("ctranslate2", "float32", None),
    "llama.cpp F32": ("llama_cpp", "F32", 1e-3),  # It reads the GELU from a table of float16.
    "llama.cpp F32 flash": ("llama_cpp", "F32+flash", 5e-3),
    "CTranslate2 int8": ("ctranslate2", "int8", 3e-1),  # 0.11 on a processor without AVX-512
    "llama.cpp F16": ("llama_cpp", "F16+flash", 2e-2),
    "llama.cpp Q8_0": ("llama_cpp", "Q8_0+flash", 1e-1),
    "llama.cpp Q4_0": ("llama_cpp", "Q4_0+flash", 5e-1),
    "picoGPT's algorithm": ("naive", "float32", None),
    "XLA's products": ("xla", "float32", None),
    "int8 products": ("int8", "int8", None),
    "transformers cuda float32": ("transformers", "float32", None),
    "transformers cuda bfloat16": ("transformers", "bfloat16", None),
    "torch.compile cuda float32": ("transformers", "float32+compile", None),
    "torch.compile cuda bfloat16": ("transformers", "bfloat16+compile", None),
}
TUNING = ("OPENBLAS_", "OMP_", "GOMP_", "KMP_", "MKL_", "XLA_", "JAX_", "GGML_", "CT2_")  # variables that are printed
CONTENDER = Path(__file__).with_name("contender.py")


def parser(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """Return the options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default="124M", choices=list(gpt_xp.SIZES))
    made.add_argument("--threads", type=int, default=usable_cores(), help="default: as many as there are cores")
    made.add_argument("--rounds", type=int, default=rounds, help=f"turns of each contender (default: {rounds})")
    made.add_argument("--only", type=_names, help="names of contenders, with commas between (default: all)")
    made.add_argument("--folder", type=Path, help="keep the model and what is made of it there (default: temporary)")
    made.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every turn there")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    return made


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def numbers(text: str) -> list[int]:
    """Return the whole numbers that commas separate."""
    return [int(number) for number in text.split(",")]


@contextlib.contextmanager
def checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    """Yield a folder with a model of random weights, laid out like the published ones; it is removed afterwards."""
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").exists():
            write_published(folder, gpt_xp.SIZES[options.size])
        yield folder


def own(folder: Path, backends: Sequence[str], label: str = "", **settings: Any) -> list[ContenderSpec]:
    """Return gpt-xp as a contender on each of the backends that can be used here; `label` is added to their names."""
    usable = usable_backends()
    specs = []
    for name in backends:
        if re.split("[+@]", name)[0] in usable:
            specs.append(gpt_xp_spec(folder, name, name=f"gpt-xp {name}{label}", **settings))
        else:
            print(f"gpt-xp {name}: skipped, `gpt-xp backends` says why", file=sys.stderr)
    return specs


def peers(folder: Path, wanted: Sequence[str], options: argparse.Namespace) -> list[ContenderSpec]:
    """Return other engines as contenders, and convert the model for them. Those that fail are skipped later."""
    specs = []
    if unknown := [name for name in wanted if name not in PEERS]:
        raise GptXpError(f"there is no {unknown[0]!r} to compare with; there are: {', '.join(PEERS)}")
    for name in wanted:
        if options.only is not None and name not in options.only:
            continue
        engine, dtype, allowed = PEERS[name]
        device = "cuda" if "cuda" in name else "cpu"
        command = [sys.executable, str(CONTENDER), engine, str(folder), "--dtype", dtype, "--device", device,
                   "--threads", str(options.threads)]  # fmt: skip
        done = subprocess.run([*command, "--prepare"], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {failure_reason(done.stderr, done.returncode)}", file=sys.stderr)
        specs.append(ContenderSpec(name, command, allowed=allowed))
    return specs


def run(
    title: str, specs: Sequence[ContenderSpec], workloads: Sequence[Workload], options: argparse.Namespace
) -> Benchmark:
    """Run the benchmark of the floor and the contenders that --only names."""
    if options.plot:
        check_plot(options.plot)
    chosen = [spec for spec in specs if options.only is None or spec.name in options.only or spec.is_floor]
    title = f"{title}, {options.size} shape, random weights"
    return run_benchmark(title, chosen, workloads, gpt_xp.SIZES[options.size].n_vocab, rounds=options.rounds,
                threads=options.threads, progress=_progress)  # fmt: skip


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    yield
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def report(options: argparse.Namespace, found: Sequence[Benchmark], more: str = "") -> None:
    """Print the benchmarks and `more`, and write the files that the options name."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    # Such a variable can make a library half as fast: OPENBLAS_CORETYPE=Haswell, where the processor has AVX-512.
    tuned = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(TUNING)]
    for line in filter(None, (command, "environment: " * bool(tuned) + " ".join(tuned))):
        print(f"    {line}" if options.markdown else line)
    print()
    for each in found:
        print(as_markdown(each) if options.markdown else as_text(each))
    print(more)
    if options.json:
        content = {"command": command, "environment": tuned, "benchmarks": [each.as_dict() for each in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        save_plot(found[0], options.plot)


def show(rows: Sequence[Sequence[str]], options: argparse.Namespace) -> str:
    """Return a table as text or Markdown."""
    return markdown_table(rows) if options.markdown else table(rows)


def measured(found: Benchmark, name: str) -> ContenderResult | None:
    """Return the result of a contender that was measured, or None."""
    return next((each for each in found.standings if each.name == name and each.figures), None)


def seconds(standing: ContenderResult, place: int, phase: str) -> list[float]:
    """Return the seconds of each round, in the workload with the index `place`."""
    return [getattr(turn, phase) for turn in standing.turns[place]]


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the ratio of two contenders' seconds, taken within each round."""
    return spread([one / other for one, other in zip(mine, theirs, strict=True)])


def as_ratio(found: Spread) -> str:
    """Return a ratio and its quartiles."""
    return f"{found.median:.3f} ({found.low:.3f}-{found.high:.3f})"


def verdict(found: Spread, target: float, at_least: bool = False) -> str:
    """Return whether a target is met: the interval of the ratio includes it, or is better."""
    met = found.high >= target if at_least else found.low <= target
    return f"{'>=' if at_least else '<='} {target:g} x: {'met' if met else 'not met'}"


def main(script: Any) -> None:
    """Run a script; print errors of the user in one line."""
    try:
        script()
    except GptXpError as error:
        sys.exit(f"error: {error}")


def floor(folder: Path) -> list[ContenderSpec]:
    """Return the floor as a contender: the matrix products alone."""
    return [floor_spec(folder)]
