"""Measure the peak memory of processes that continue one prompt, compared with the weights and the cache.

    python benchmarks/memory.py --size 124M

A model of that shape (random float32 weights, the real tokenizer) generates two tokens after prompts of 16 and of 960
tokens, each in a new process. The figure is the peak resident set (VmHWM of Linux). It has three parts:

- the interpreter and its libraries, also measured in a process that only imports the array library;
- the file of weights, if it is mapped: its pages are clean page cache, which the system can take back and other
  processes share, but they count in full;
- the memory that the process allocates.

`ratio` is the whole figure divided by the bytes of the weights and of the cache (on JAX a cache for the whole context).
`less base` is the same without the libraries.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from startup import machine, make_model

N_NEW = 2
PEAK = "\nfrom gpt_xp.memory import peak_process_memory as peak\n"
GPT_XP = f"""
import json, sys
import gpt_xp
{PEAK}
model = gpt_xp.load(sys.argv[1], backend=sys.argv[2])
out = model.generate([5 + 7 * i for i in range(int(sys.argv[3]))], max_tokens={N_NEW}, ignore_eos=True)
n_slots = model.backend.cache_slots(int(sys.argv[3]) + {N_NEW}, model.config.n_ctx)
print(json.dumps([peak(), n_slots]))
"""
TRANSFORMERS = f"""
import json, sys, torch
from transformers import GPT2LMHeadModel
{PEAK}
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
ids = torch.tensor([[5 + 7 * i for i in range(int(sys.argv[3]))]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens={N_NEW}, min_new_tokens={N_NEW},
                     do_sample=False, pad_token_id=50256)
print(json.dumps([peak(), out.shape[1]]))
"""
BASES = {  # code that imports a library without a model
    "numpy": "import gpt_xp, numpy",
    "native": "import gpt_xp, llvmlite.binding",
    "jax": "import gpt_xp, jax; jax.devices()",
    "torch": "import gpt_xp, torch",
    "transformers": "import gpt_xp, torch; from transformers import GPT2LMHeadModel",
}


def main() -> None:
    """Make the model, unless the folder has it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=["124M", "355M", "774M", "1558M"])
    parser.add_argument("--folder", type=Path, help="where to make the model, or find it; kept (default: temporary)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 960], help="their lengths in tokens")
    parser.add_argument("--only", nargs="+", choices=[*BASES], default=[*BASES], help="these alone")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
        os.environ[name] = str(options.threads)

    print(machine(options.threads))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_model(folder, options.size)
        print(f"{options.size}, float32, {N_NEW} tokens after the prompt; MB")
        print(f"{'':14}{'prompt':>7}{'weights':>9}{'cache':>7}{'base':>6}{'peak':>7}{'ratio':>7}{'less base':>11}")
        for name in options.only:
            if all(importlib.util.find_spec(module) for module in modules(name)):
                for n_prompt in options.prompts:
                    measure(name, folder, options.size, n_prompt)
            else:
                print(f"{name} is not installed")


def measure(name: str, folder: Path, size: str, n_prompt: int) -> None:
    """Print one line."""
    import gpt_xp

    config = gpt_xp.SIZES[size]
    weights = 4 * config.n_params
    base = child(BASES[name] + PEAK + "import json; print(json.dumps([peak()]))")[0]
    script = TRANSFORMERS if name == "transformers" else GPT_XP
    peak, n_slots = child(script, str(folder), name, str(n_prompt))
    cache = 4 * 2 * config.n_layer * config.n_embd * n_slots
    needed = weights + cache
    print(
        f"{name:14}{n_prompt:7}{weights / 1e6:9.0f}{cache / 1e6:7.0f}{base / 1e6:6.0f}{peak / 1e6:7.0f}"
        f"{peak / needed:7.3f}{(peak - base) / needed:11.3f}"
    )


def modules(name: str) -> list[str]:
    """Return what must be installed."""
    return {"transformers": ["torch", name], "native": ["llvmlite"]}.get(name, [name])


def child(code: str, *arguments: str) -> list[Any]:
    """Run Python code in a new process, and return the list that it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"it failed: {arguments}\n{done.stderr}")
    found: list[Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
