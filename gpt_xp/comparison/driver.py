"""`gpt_xp.compare`: run each backend in its own process, one after the other, and compare what they compute."""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp import json_text
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.comparison.figures import ComparisonFigures, compare_layers, compare_logits, compare_tokens
from gpt_xp.comparison.job import MODES, PROMPTS
from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.config import GPT2Config
from gpt_xp.errors import GptXpError, PromptError, SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.processes import (
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
    names = usable_backends() if backends is None else [name.removesuffix("@") for name in listed(backends)]
    dtypes = listed(dtypes)
    _check(names, dtypes, max_tokens, seed)
    folder = find_model(model)
    config = read_config(folder)
    texts = tuple(PROMPTS if prompts is None else listed(prompts))
    ids = _encode(texts, Tokenizer.from_directory(folder), config, max_tokens)
    job = {"model": str(folder), "prompts": ids, "max_tokens": max_tokens, "seed": seed, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="gpt-xp-compare-") as temporary:
        with progress("the reference, numpy float64"):
            reference = _ProcessOutput(Path(temporary, "reference"), *REFERENCE, job, expected=None)
        if reference.failure:
            raise GptXpError(f"the reference, NumPy in float64, could not be computed: {reference.failure}")
        results: list[BackendResult] = []
        for name in names:
            for dtype in dtypes:
                with progress(f"{name} {dtype}"):
                    results.append(_run(Path(temporary, f"run-{len(results)}"), name, dtype, job, reference))
    return Comparison(
        str(model or default_model()), config, texts, tuple(map(len, ids)), max_tokens, seed,
        reference.describe(), tuple(results),
    )  # fmt: skip


def _check(names: list[str], dtypes: Sequence[str], max_tokens: int, seed: int) -> None:
    if not names:
        raise SettingError("no backend was named, and so there is nothing to compare")
    for name in names:
        check_installed(name.partition("@")[0])
    check_dtypes(dtypes)
    if max_tokens < 1 or seed < 0:
        raise SettingError("max_tokens must be at least 1, and the seed at least 0")


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


class _ProcessOutput:
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
            env=os.environ | thread_variables(job["threads"]),
        )  # fmt: skip
        self.result: dict[str, Any] = {}
        self.failure = None
        if done.returncode == 0:
            self.result = json_text.parse((folder / "result.json").read_bytes())
        else:
            self.failure = failure_reason(done.stderr, done.returncode)

    def arrays(self, kind: str) -> Iterator[Any]:
        return (np.load(self.folder / f"{kind}-{number}.npy", mmap_mode="r") for number in range(self.n_prompts))

    def describe(self) -> BackendResult:
        known = {key: self.result[key] for key in ("device", "version", "settings", "peak_memory_bytes")}
        return BackendResult(self.backend, self.dtype, speed=self.result.get("speed", {}), **known)


def _run(folder: Path, name: str, dtype: str, job: dict[str, Any], reference: _ProcessOutput) -> BackendResult:
    expected = {mode: reference.result["generation"][mode]["free"] for mode in MODES}
    outcome = _ProcessOutput(folder, name, dtype, job, expected)
    if outcome.failure:
        if "does not compute in" in outcome.failure:
            return BackendResult(name, dtype, skipped=outcome.failure)
        return BackendResult(name, dtype, problems=(outcome.failure,))
    logits = list(reference.arrays("logits"))
    figures = ComparisonFigures(
        compare_layers(list(outcome.arrays("layers")), list(reference.arrays("layers")), dtype),
        compare_logits(list(outcome.arrays("logits")), logits),
        {
            mode: compare_tokens(
                mine["forced"], (theirs := reference.result["generation"][mode])["forced"], mine["free"], theirs["free"]
            )
            for mode, mine in outcome.result.get("generation", {}).items()
        },
    )
    problems = figures.problems(dtype, max(float(np.abs(each).max()) for each in logits))
    if outcome.result["problem"]:
        problems.append(outcome.result["problem"])
    return dataclasses.replace(outcome.describe(), figures=figures, problems=tuple(problems))
