"""Show the memory of a process that runs gpt-xp on JAX, in MB after each stage (Linux, glibc).

    python benchmarks/jax_memory.py --folder FOLDER --prompt 960

FOLDER has a checkpoint, or one is made there. `anon` is the memory that the process allocated, `file` the pages of its
libraries and mapped files, `peak` the largest sum of both so far. "given back" is after malloc_trim: `anon` then falls
by the memory that was freed and that the C library had kept.
"""

import argparse
import ctypes
import re
from pathlib import Path

from startup import make_model


def main() -> None:
    """Run one prompt and print a line after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=["124M", "355M", "774M", "1558M"])
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is made")
    parser.add_argument("--prompt", type=int, default=960, help="its length in tokens")
    options = parser.parse_args()
    make_model(options.folder, options.size)

    print(f"{'':24}{'peak':>6}{'all':>6}{'anon':>6}{'file':>6}")
    import gpt_xp

    say("gpt_xp imported")
    import jax

    jax.devices()
    say("JAX started")
    model = gpt_xp.load(options.folder, backend="jax")
    say("model loaded")
    logits, cache = model._decoder.prefill([[5 + 7 * i for i in range(options.prompt)]])
    logits.block_until_ready()
    say("prompt run")
    cache = model._decoder.decode([5], cache)[1]
    jax.block_until_ready(cache)
    say("a token decoded")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    say("given back")
    print(f"arrays that are alive: {sum(array.nbytes for array in jax.live_arrays()) / 1e6:.0f}")


def say(what: str) -> None:
    """Print what the process holds now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = [
        re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE) for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    ]
    print(f"{what:24}" + "".join(f"{int(each[1]) * 1024 / 1e6:6.0f}" for each in found if each))


if __name__ == "__main__":
    main()
