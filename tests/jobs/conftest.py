"""Fixtures of bulk jobs: an engine in this process, which is fast, and helpers to read parts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gpt_xp
from gpt_xp.jobs.run import bulk
from gpt_xp.jobs.status import BulkStatus, join
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.jobs.worker import ShardResult, Worker, WorkerOptions

Bulk = Callable[..., BulkStatus]


@pytest.fixture(scope="session")
def one_thread() -> gpt_xp.Model:
    """Return the bundled model on one thread. Two threads of each of pytest's processes would take 10 times as long."""
    return gpt_xp.load("shakespeare", backend="numpy", threads=1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, one_thread: gpt_xp.Model) -> None:
    """Run jobs in this process, with the bundled model on NumPy unless a test names another backend."""
    from gpt_xp.jobs import worker

    load = worker.load_model

    def run_here(
        options: WorkerOptions, numbers: Iterator[int], workers: int, gpus: int, watcher: Watcher
    ) -> Iterator[ShardResult]:
        one = Worker(options)
        for number in numbers:
            yield one.run(number)

    def load_here(job: Any, options: WorkerOptions) -> gpt_xp.Model:
        return one_thread if options.backend in (None, "numpy") and job.dtype == "float32" else load(job, options)

    monkeypatch.setattr("gpt_xp.jobs.run._engine", lambda name: run_here)
    monkeypatch.setattr(worker, "load_model", load_here)


@pytest.fixture
def run(here: None, tmp_path: Path) -> Bulk:
    """Return a function that runs a job on `out` in this process, with few tokens."""

    def run(*files: Path, out: str = "out", **options: Any) -> BulkStatus:
        few = {} if options.get("kind", "generate") != "generate" else {"max_tokens": 5}
        return bulk(files, tmp_path / out, **{"model": "shakespeare", "seed": 7, **few, **options})

    return run


@pytest.fixture
def lines_of(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that returns the records of the job in `out`, in order."""

    def lines_of(out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(line) for line in b"".join(join(tmp_path / out)).splitlines()]

    return lines_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return a file of 30 prompts of different lengths."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"ROMEO {number}:{' my lord' * (number % 5)}\n" for number in range(30)))
    return path
