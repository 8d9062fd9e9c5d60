"""Run one contender that is not gpt-xp. `gpt_xp.benchmark` starts this process and talks to it through pipes.

    python benchmarks/contender.py llama_cpp FOLDER --dtype Q8_0 --threads 2 [--prepare]

FOLDER holds a checkpoint. --prepare only writes the files of the engine to it.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.worker import serve


def main() -> None:
    """Prepare or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["transformers", "ctranslate2", "llama_cpp", "naive", "xla", "int8"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()

    if options.prepare:
        importlib.import_module(f"contenders.{options.engine}").prepare(options.folder, options.dtype)
    else:
        serve(lambda: contender(options))


def contender(options: argparse.Namespace) -> Any:
    """Import the engine and load the model."""
    module = importlib.import_module(f"contenders.{options.engine}")
    return module.Contender(options.folder, options.dtype, options.threads, options.device)


if __name__ == "__main__":
    main()
