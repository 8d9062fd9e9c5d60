"""Running a comparison: each backend in a process of its own, one after the other, and the figures of all."""

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp import json_text
from gpt_xp.backend import check_installed
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.comparison.figures import Figures, compare_layers, compare_logits, compare_tokens
from gpt_xp.comparison.prompts import PROMPTS
from gpt_xp.comparison.worker import MODES
from gpt_xp.config import GPT2Config
from gpt_xp.errors import GptXpError, PromptError, SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.processes import own_command, reason, thread_variables, usable_backends
from gpt_xp.reporting.text import listed
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tree import finite
from gpt_xp.version import __version__

REFERENCE = ("numpy", "float64")
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Run:
    """One backend in one dtype.

    `figures` is None where it could not run, and `problems` says why; otherwise they are what is outside the tolerance.
    `skipped` says why a dtype was left out that the backend does not compute in.
    """

    backend: str
    dtype: str
    device: str | None = None
    version: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    figures: Figures | None = None
    problems: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def is_ok(self) -> bool:
        """Whether everything is within the tolerance of the dtype."""
        return not self.problems


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `reference` is the float64 run on NumPy that all others were held against."""

    model: str
    config: GPT2Config
    prompts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    seed: int
    reference: Run
    runs: tuple[Run, ...]
    version: str = __version__

    @property
    def is_ok(self) -> bool:
        """Whether every run is within the tolerance of its dtype, and at least one was not skipped."""
        return all(run.is_ok for run in self.runs) and any(run.figures for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold: numbers that are not finite become None."""
        content = dataclasses.asdict(self)
        content["is_ok"] = self.is_ok
        for record, run in zip(content["runs"], self.runs, strict=True):
            record["is_ok"] = run.is_ok
            layer = run.figures.first_out_of_line if run.figures else None
            record["first_layer_out_of_line"] = layer.name if layer else None
        as_json: dict[str, Any] = finite(content)
        return as_json


def compare(
    backends: str | Sequence[str] | None = None,
    model: str | Path | None = None,
    prompts: str | Sequence[str] | None = None,
    *,
    dtypes: str | Sequence[str] = ("float32",),
    max_tokens: int = 32,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda what: contextlib.nullcontext(),
) -> Comparison:
    """Run one model on several backends, and return by how much each differs from float64 on NumPy.

    `backends` are names, with a device behind "@" if need be ("jax@cpu"); None: all that can be used here. Each runs
    in a process of its own, with each of `dtypes` that it computes in. `model` is as for `load`; `prompts` None are
    those of `comparison.prompts`, and `max_tokens` are generated from each, greedily and at temperature 1 with `seed`.
    `progress` is entered with the name of each run. A list of one may be given as it is.

    Raises `SettingError`, `BackendError` where a backend is unknown or not installed, `PromptError`, and the errors of
    `load`; what goes wrong in a backend's own
    process is in its `Run`.
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
            reference = _Outcome(Path(temporary, "reference"), *REFERENCE, job, expected=None)
        if reference.failure:
            raise GptXpError(f"the reference, NumPy in float64, could not be computed: {reference.failure}")
        runs: list[Run] = []
        for name in names:
            for dtype in dtypes:
                with progress(f"{name} {dtype}"):
                    runs.append(_run(Path(temporary, f"run-{len(runs)}"), name, dtype, job, reference))
    return Comparison(
        str(model or default_model()), config, texts, tuple(map(len, ids)), max_tokens, seed,
        reference.describe(), tuple(runs),
    )  # fmt: skip


def _check(names: list[str], dtypes: Sequence[str], max_tokens: int, seed: int) -> None:
    if not names:
        raise SettingError("no backend was named, and so there is nothing to compare")
    for name in names:
        check_installed(name.partition("@")[0])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise SettingError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
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


class _Outcome:
    """What a backend's process left in its folder."""

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
            self.failure = reason(done.stderr, done.returncode)

    def arrays(self, kind: str) -> Iterator[Any]:
        return (np.load(self.folder / f"{kind}-{number}.npy", mmap_mode="r") for number in range(self.n_prompts))

    def describe(self) -> Run:
        known = {key: self.result[key] for key in ("device", "version", "settings", "peak_memory_bytes")}
        return Run(self.backend, self.dtype, speed=self.result.get("speed", {}), **known)


def _run(folder: Path, name: str, dtype: str, job: dict[str, Any], reference: _Outcome) -> Run:
    expected = {mode: reference.result["generation"][mode]["free"] for mode in MODES}
    outcome = _Outcome(folder, name, dtype, job, expected)
    if outcome.failure:
        if "does not compute in" in outcome.failure:
            return Run(name, dtype, skipped=outcome.failure)
        return Run(name, dtype, problems=(outcome.failure,))
    logits = list(reference.arrays("logits"))
    figures = Figures(
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
