"""How long gpt-xp takes to start, beside importing NumPy alone.

    python benchmarks/startup.py

Prints the modules that `import gpt_xp` spends most on (python -X importtime, the best of several runs: cumulative, so
`numpy` counts all that it imports), and the median wall time of whole processes, taken in turn.
"""

import argparse
import statistics
import subprocess
import sys
import time

PROCESSES = {
    "python -c 'import numpy'": ["-c", "import numpy"],
    "python -c 'import gpt_xp'": ["-c", "import gpt_xp"],
    "gpt-xp --help": ["-m", "gpt_xp", "--help"],
    "gpt-xp tokens ROMEO:": ["-m", "gpt_xp", "tokens", "ROMEO:"],
    "gpt-xp -n 1 ROMEO: (first token)": ["-m", "gpt_xp", "-n", "1", "ROMEO:"],
}


def main() -> None:
    """Run and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs

    print("import gpt_xp, milliseconds (cumulative)")
    for name, microseconds in sorted(import_times(runs).items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:32} {microseconds / 1000:8.1f}")
    print(f"\nwhole processes, milliseconds (median of {runs}, interleaved)")
    for name, seconds in process_times(runs).items():
        print(f"  {name:34} {1000 * statistics.median(seconds):8.0f}")


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


def process_times(runs: int) -> dict[str, list[float]]:
    """Return the wall times of each process."""
    times: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for _ in range(runs):
        for name, arguments in PROCESSES.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    main()
