"""Measure what a bulk job costs beside its model: `gpt-xp bulk` against the plain loop, and with a model of no work.

    python benchmarks/bulk.py                      # 2000 prompts: the plain loop and bulk take turns
    python benchmarks/bulk.py --null 1000000       # a model that does nothing: seconds and memory of a million lines
    python benchmarks/bulk.py --ray                # shards of no work on Ray: milliseconds a shard

The plain loop calls `Model.generate` over the same batches in this process and writes nothing. The time of bulk is that
from the moment its worker has loaded the model to the last renamed part. Starting a process and loading are not in it.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpt_xp
from gpt_xp.generation.results import Generation, Stats
from gpt_xp.jobs import local_engine, worker
from gpt_xp.jobs.watcher import Watcher

NULL_WORKER = """
import sys
sys.path.insert(0, {folder!r})
from bulk import NullModel
from gpt_xp.jobs import worker, worker_process

worker.load_model = lambda job, options: NullModel()
worker_process.main()
"""
FEW, MANY = 50, 500  # shards; their difference leaves out what Ray takes to start


class NullModel:
    """A model that continues every prompt with nothing."""

    tokenizer = None

    def generate(self, prompts: Sequence[str], settings: Any) -> list[Generation]:
        """Return an empty continuation of each prompt."""
        return [Generation("", [], [], [], "max_tokens", Stats()) for _ in prompts]


class Clock(Watcher):
    """Takes the time from the moment the model is loaded to the end."""

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def loaded(self, warnings: Sequence[str]) -> None:
        """Begin."""
        self._since = time.perf_counter()

    def ends(self) -> None:
        """End."""
        self.seconds = time.perf_counter() - self._since


def script() -> None:
    """Measure what the options ask for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--null", type=int, metavar="LINES", help="lines of a job whose model does nothing")
    made.add_argument("--ray", action="store_true", help="shards of no work on Ray")
    made.add_argument("--prompts", type=int, default=2000, help="prompts against the plain loop (default: 2000)")
    made.add_argument("--tokens", type=int, default=20, help="tokens of each (default: 20)")
    made.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    made.add_argument("--threads", type=int, default=1, help="threads of the model (default: 1)")
    made.add_argument("--workers", type=int, default=1, help="workers of --null and --ray (default: 1)")
    made.add_argument("--shard-bytes", type=int, help="bytes of a shard (default: a thousandth, at least 4 KiB)")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.null:
            null_job(options, Path(folder))
        elif options.ray:
            ray_shards(options, Path(folder))
        else:
            against_the_loop(options, Path(folder))


def against_the_loop(options: argparse.Namespace, folder: Path) -> None:
    """Print the seconds of bulk and of the plain loop, and their ratio, for each round."""
    file = write_prompts(folder / "prompts.txt", options.prompts)
    model = gpt_xp.load("shakespeare", backend="numpy", threads=options.threads)
    ratios = []
    for turn in range(options.rounds):
        loop, clock = plain_loop(model, file, options.tokens), Clock()
        sampling = {"temperature": 1.0, "top_k": 40, "max_tokens": options.tokens, "seed": 1}
        gpt_xp.bulk(
            file, folder / f"out{turn}", model="shakespeare", backend="numpy", threads=options.threads, watcher=clock,
            shard_bytes=options.shard_bytes, **sampling,
        )  # fmt: skip
        ratios.append(clock.seconds / loop)
        print(f"round {turn + 1}: loop {loop:.2f} s, bulk {clock.seconds:.2f} s, ratio {ratios[-1]:.4f}", flush=True)
    print(f"median of the ratios: {statistics.median(ratios):.4f} (at most 1.02)")


def plain_loop(model: gpt_xp.Model, file: Path, tokens: int) -> float:
    """Return the seconds to continue all prompts, in the batches of a bulk job."""
    lines = file.read_text().splitlines()
    begin = time.perf_counter()
    for first in range(0, len(lines), worker.WINDOW):
        window = sorted(lines[first : first + worker.WINDOW], key=len, reverse=True)
        for at in range(0, len(window), 8):
            batch = window[at : at + 8]
            model.generate(batch, max_tokens=tokens, temperature=1.0, top_k=40, seed=[*range(len(batch))])
    return time.perf_counter() - begin


def null_job(options: argparse.Namespace, folder: Path) -> None:
    """Print the seconds and the memory of a job whose model does nothing."""
    file = write_prompts(folder / "prompts.txt", options.null)
    (folder / "null_worker.py").write_text(NULL_WORKER.format(folder=str(Path(__file__).parent)))
    local_engine.COMMAND[:] = [sys.executable, str(folder / "null_worker.py")]
    clock = Clock()
    found = gpt_xp.bulk(
        file, folder / "out", model="shakespeare", temperature=1.0, workers=options.workers, watcher=clock,
        shard_bytes=options.shard_bytes,
    )  # fmt: skip
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, workers = (resource.getrusage(who).ru_maxrss / 1000 for who in whose)
    print(
        f"{found.prompts} lines of {file.stat().st_size} bytes in {found.shards} shards: {clock.seconds:.1f} s, "
        f"{found.prompts / clock.seconds:.0f} lines/s; peak memory {own:.0f} MB (driver), {workers:.0f} MB (a worker)"
    )


def ray_shards(options: argparse.Namespace, folder: Path) -> None:
    """Print the milliseconds that a shard takes on Ray where its model does nothing."""
    from gpt_xp.jobs import ray_engine

    class NullActor(ray_engine.ShardActor):  # Defined here, so that Ray sends it to the actors by value.
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            worker.load_model = lambda job, options: NullModel()  # type: ignore[assignment, return-value]
            return super().__call__(batch)

    ray_engine.ShardActor = NullActor  # type: ignore[misc]
    for turn in range(options.rounds):
        seconds = {}
        for shards in (FEW, MANY):
            file = folder / f"{turn}-{shards}.txt"
            file.write_text("x\n" * shards)
            clock = Clock()
            gpt_xp.bulk(
                file, folder / f"out-{turn}-{shards}", model="shakespeare", engine="ray", workers=options.workers,
                shard_bytes=2, watcher=clock,
            )  # fmt: skip
            seconds[shards] = clock.seconds
        each = 1000 * (seconds[MANY] - seconds[FEW]) / (MANY - FEW)
        times = ", ".join(f"{shards} shards {taken:.2f} s" for shards, taken in seconds.items())
        print(f"{times}: {each:.1f} ms a shard (at most 20)", flush=True)


def write_prompts(path: Path, count: int) -> Path:
    """Write prompts of different lengths."""
    with path.open("w") as file:
        file.writelines(f"ROMEO {number}:{' my lord' * (number % 13)}\n" for number in range(count))
    return path


if __name__ == "__main__":
    script()
