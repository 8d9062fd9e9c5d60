"""Measure the time and the memory to load a downloaded or converted model on NumPy.

    python benchmarks/load.py --size 1558M

A file of random weights is written like the published ones: a header of odd length, and the mask buffers among the
weights. Then it is aligned, as gpt-xp does after a download or a conversion. Several processes load it and compute the
logits of 8 tokens. For the first, only a part of the file may be in the page cache. --cold removes the file from there
before each process.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
import gpt_xp
from gpt_xp.memory import peak_process_memory
before = peak_process_memory()
begin = time.perf_counter()
model = gpt_xp.load(sys.argv[1], backend="numpy")
loaded = time.perf_counter()
logits = model.logits([1, 50, 3, 7, 20, 11, 2, 5])
done = time.perf_counter()
assert logits.shape == (8, model.config.n_vocab) and abs(logits).max() > 0
print(json.dumps([loaded - begin, done - loaded, before, peak_process_memory()]))
"""


def main() -> None:
    """Make the model, unless the folder has it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=["124M", "355M", "774M", "1558M"])
    parser.add_argument("--folder", type=Path, help="where to make the model, or find it; kept (default: temporary)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each (Linux)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        weights = folder / "model.safetensors"
        if not weights.exists():
            # A new process runs it, because Linux counts the peak memory of a process from that of its parent.
            maker = multiprocessing.Process(target=make, args=(folder, options.size))
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit("the model could not be made")
        n_bytes = weights.stat().st_size
        print(f"{options.size}: {n_bytes / 1e9:.2f} GB; load s, 8 tokens s, peak memory GB, of the file's size")
        runs = []
        for _ in range(options.runs):
            if options.cold:
                forget(weights)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=True
            )
            load, forward, before, peak = json.loads(done.stdout)
            runs.append((load, forward, peak))
            print(
                f"  {load:7.3f} {forward:7.2f} {peak / 1e9:7.2f} {peak / n_bytes:7.1%}  ({before / 1e6:.0f} MB before)"
            )
        load, forward, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"median {load:.3f} s to load, {forward:.2f} s for 8 tokens, peak memory {peak / n_bytes:.1%} of the file"
        )


def make(folder: Path, size: str) -> None:
    """Write config, tokenizer and weights; the weights are written as published, and then aligned."""
    import gpt_xp
    from gpt_xp.atomic_files import write_json
    from gpt_xp.checkpoint.config_json import config_entries
    from gpt_xp.checkpoint.weights import align_weights
    from gpt_xp.hub.find import BUNDLED

    config = gpt_xp.SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(str(folder / "config.json"), config_entries(config, "float32")[0])
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / "shakespeare" / name, folder)
    published = folder / "published.safetensors"
    begin = time.perf_counter()
    write_published(published, config)
    written = time.perf_counter()
    align_weights(published, folder / "model.safetensors")
    aligned = time.perf_counter()
    n_bytes = published.stat().st_size
    published.unlink()
    print(
        f"published file: {n_bytes / 1e9:.2f} GB, made in {written - begin:.1f} s, aligned in {aligned - written:.1f} s"
    )


def write_published(path: Path, config: Any) -> None:
    """Write random weights, a part at a time, after a header of odd length."""
    import numpy as np

    shapes = dict(published_shapes(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (1 - len(text) % 2)  # The length is odd, as in gpt2, so no float32 begins at a multiple of 4.
    # A prime number of values is repeated, which is cheap, and no two rows are equal.
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(2**20 + 7, dtype=np.float32) * np.float32(0.02)).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(end // len(values)):
            file.write(values)
        file.write(values[: end % len(values)])


def published_shapes(config: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield names and shapes as the Hub's gpt2 has them."""
    n, n_ctx = config.n_embd, config.n_ctx
    for i in range(config.n_layer):
        yield f"h.{i}.attn.bias", [1, 1, n_ctx, n_ctx]
        for name, n_in, n_out in (("attn.c_attn", n, 3 * n), ("attn.c_proj", n, n),
                                  ("mlp.c_fc", n, 4 * n), ("mlp.c_proj", 4 * n, n)):  # fmt: skip
            yield f"h.{i}.{name}.bias", [n_out]
            yield f"h.{i}.{name}.weight", [n_in, n_out]
        for name in ("ln_1", "ln_2"):
            yield f"h.{i}.{name}.bias", [n]
            yield f"h.{i}.{name}.weight", [n]
    yield "ln_f.bias", [n]
    yield "ln_f.weight", [n]
    yield "wpe.weight", [n_ctx, n]
    yield "wte.weight", [config.n_vocab, n]


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
