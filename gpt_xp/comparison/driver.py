"""`gpt_xp.compare`: run each backend in its own process, one after the other, and compare what they compute."""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpt_xp import json_text
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.comparison.figures import ComparisonFigures, compare_layers, compare_logits, compare_tokens
from gpt_xp.comparison.job import PROMPTS
from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.config import GPT2Config
from gpt_xp.errors import GptXpError, PromptError, SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.processes import (
    JAX_VARIABLES,
    StageProgress,
    check_dtypes,
    failure_reason,
    no_stage_progress,
    own_command,
    thread_variables,
    usable_backends,
)
from gpt_xp.registry import check_installed
from gpt_xp.reporting.text import listed
from gpt_xp.tokenizer.bpe import Tokenizer

REFERENCE = ("numpy", "float64")

Kept = TypeVar("Kept")


def compare(
    backends: str | Sequence[str] | None = None,
    model: str | Path | None = None,
    prompts: str | Sequence[str] | None = None,
    *,
    dtypes: str | Sequence[str] = ("float32",),
    max_tokens: int = 32,
    seed: int = 0,
    threads: int | None = None,
    progress: StageProgress = no_stage_progress,
) -> Comparison:
    """Run one model on several backends, and return how far each differs from float64 on NumPy: a `Comparison`.

    `backends` are names, followed by "@" and a device where it matters ("jax@cpu"). None takes all backends that can be
    used here. Each runs in its own process, in each of `dtypes` that it computes in. `model` is as for `load`. From
    each of `prompts` (None: those of `comparison/job.py`) `max_tokens` are generated, greedily and at temperature 1
    with `seed`. `threads` (None: the library's choice) limits those of the CPU. `progress(stage)` returns a context
    that is entered while that backend runs. One value may be given in place of a list.

    A backend that fails in its process has its error in its `BackendResult`. Raises `SettingError` for values that make
    no sense, and `BackendError` for a backend that is unknown or not installed. Raises `PromptError` for prompts that
    do not fit the context, and the errors of `load`.
    """
    dtypes = listed(dtypes)
    names = check_backends(backends, dtypes)
    if max_tokens < 1 or seed < 0:
        raise SettingError("max_tokens must be at least 1, and the seed at least 0")
    folder = find_model(model)
    config = read_config(folder)
    texts = tuple(PROMPTS if prompts is None else listed(prompts))
    ids = _encode(texts, Tokenizer.from_directory(folder), config, max_tokens)
    job = {"model": str(folder), "prompts": ids, "max_tokens": max_tokens, "seed": seed, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="gpt-xp-compare-") as temporary:
        reference, results = run_all(Path(temporary), names, dtypes, job, progress, keep=lambda result, *_: result)
    return Comparison(
        str(model or default_model()), config, texts, tuple(map(len, ids)), max_tokens, seed,
        reference, tuple(results),
    )  # fmt: skip


def check_backends(backends: str | Sequence[str] | None, dtypes: Sequence[str]) -> list[str]:
    """Return the names of `backends`, as `compare` takes them. Raises `SettingError` and `BackendError` as it does."""
    names = usable_backends() if backends is None else [name.removesuffix("@") for name in listed(backends)]
    if not names:
        raise SettingError("no backend was named, and so there is nothing to compare")
    for name in names:
        check_installed(name.partition("@")[0])
    check_dtypes(dtypes)
    return names


def run_all(
    folder: Path,
    names: Sequence[str],
    dtypes: Sequence[str],
    job: dict[str, Any],
    progress: StageProgress,
    keep: "Callable[[BackendResult, ProcessOutput, ProcessOutput], Kept]",
) -> tuple[BackendResult, list[Kept]]:
    """Run the reference and then each backend in each dtype. Return the reference, and what `keep` returns of each run.

    `keep(result, outcome, reference)` sees the arrays that the processes wrote to `folder`.
    """
    with progress("the reference, numpy float64"):
        reference = ProcessOutput(folder / "reference", *REFERENCE, job, expected=None)
    if reference.failure:
        raise GptXpError(f"the reference, NumPy in float64, could not be computed: {reference.failure}")
    kept: list[Kept] = []
    for name in names:
        for dtype in dtypes:
            with progress(f"{name} {dtype}"):
                kept.append(keep(*_run(folder / f"run-{len(kept)}", name, dtype, job, reference), reference))
    return reference.describe(), kept


def _encode(texts: Sequence[str], tokenizer: Tokenizer, config: GPT2Config, max_tokens: int) -> list[list[int]]:
    if max_tokens >= config.n_ctx:
        raise SettingError(
            f"max_tokens is {max_tokens}, and must leave room for a prompt in the context of {config.n_ctx}"
        )
    ids = [tokenizer.encode(text) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        if not 1 <= len(row) <= config.n_ctx - max_tokens:
            raise PromptError(
                f"the prompt {text!r:.40} has {len(row)} tokens; 1 to {config.n_ctx - max_tokens} can be compared, so "
                f"that {max_tokens} more fit the context of {config.n_ctx}"
            )
    return ids


class ProcessOutput:
    """Runs a backend in its own process, and holds what the process wrote to its folder."""

    def __init__(self, folder: Path, backend: str, dtype: str, job: dict[str, Any], expected: Any) -> None:
        name, _, device = backend.partition("@")
        own = {"backend": name, "device": device or None, "dtype": dtype, "expected": expected}
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job | own), encoding="utf-8")
        self.folder, self.backend, self.dtype = folder, backend, dtype
        self.n_prompts = len(job["prompts"])
        command = own_command("compare-backend", str(folder / "job.json"))
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False,
            env=os.environ | JAX_VARIABLES | thread_variables(job["threads"]),
        )  # fmt: skip
        self.result: dict[str, Any] = {}
        self.failure = None
        if done.returncode == 0:
            self.result = json_text.parse((folder / "result.json").read_bytes())
        else:
            self.failure = failure_reason(done.stderr, done.returncode)

    def arrays(self, kind: str) -> Iterator[Any]:
        """Yield the "layers" or "logits" of each prompt, as `worker` wrote them."""
        return (np.load(self.folder / f"{kind}-{number}.npy", mmap_mode="r") for number in range(self.n_prompts))

    def describe(self) -> BackendResult:
        """Return the record of a run that did not fail, without figures."""
        known = {key: self.result[key] for key in ("device", "version", "settings", "peak_memory_bytes")}
        return BackendResult(self.backend, self.dtype, speed=self.result.get("speed", {}), **known)


def _run(
    folder: Path, name: str, dtype: str, job: dict[str, Any], reference: ProcessOutput
) -> tuple[BackendResult, ProcessOutput]:
    theirs = reference.result["generation"]
    expected = {mode: found["free"] for mode, found in theirs.items()}
    outcome = ProcessOutput(folder, name, dtype, job, expected)
    if outcome.failure:
        if "does not compute in" in outcome.failure:
            return BackendResult(name, dtype, skipped=outcome.failure), outcome
        return BackendResult(name, dtype, problems=(outcome.failure,)), outcome
    logits = list(reference.arrays("logits"))
    figures = ComparisonFigures(
        compare_layers(list(outcome.arrays("layers")), list(reference.arrays("layers")), dtype),
        compare_logits(list(outcome.arrays("logits")), logits),
        {
            mode: compare_tokens(mine["forced"], theirs[mode]["forced"], mine["free"], theirs[mode]["free"])
            for mode, mine in outcome.result.get("generation", {}).items()
        },
    )
    problems = figures.problems(dtype, max(float(np.abs(each).max()) for each in logits))
    if outcome.result["problem"]:
        problems.append(outcome.result["problem"])
    return dataclasses.replace(outcome.describe(), figures=figures, problems=tuple(problems)), outcome
