"""`gpt_xp.bench`: measure one model on several backends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_xp.benchmark.driver import run_benchmark
from gpt_xp.benchmark.figures import N_NEW, Workload
from gpt_xp.benchmark.results import Benchmark, ContenderSpec
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.processes import StageProgress, check_dtypes, no_stage_progress, own_command, usable_backends
from gpt_xp.quantization import check_kind
from gpt_xp.registry import check_installed
from gpt_xp.reporting.text import listed


def gpt_xp_spec(
    model: str | Path, backend: str, dtype: str = "float32", *, name: str | None = None, **options: Any
) -> ContenderSpec:
    """Return gpt-xp on one backend as a contender. `model` is a directory.

    `backend` is a name, followed by "+int8" for quantized weights and by "@cuda" for a device. `options` are further
    arguments of `contenders.GptXp`, such as `sampling={"temperature": 0.8}`.
    """
    library, quantize, device = _parts(backend)
    job = {"model": str(model), "backend": library, "device": device, "dtype": dtype, "quantize": quantize, **options}
    return _spec(name or f"{backend} {dtype}", "gpt-xp", job)


def floor_spec(model: str | Path) -> ContenderSpec:
    """Return the floor as a contender: the matrix products alone, over the weights in the directory `model`."""
    return _spec("floor", "floor", {"model": str(model)}, is_floor=True)


def _spec(name: str, contender: str, job: dict[str, Any], is_floor: bool = False) -> ContenderSpec:
    command = own_command("bench-worker", json.dumps({"contender": contender, **job}))
    return ContenderSpec(name, tuple(command), is_floor)


def _parts(backend: str) -> tuple[str, str | None, str | None]:
    """Return the library, quantization and device of a name such as "torch+int8@cuda"."""
    before, _, device = backend.partition("@")
    library, _, quantize = before.partition("+")
    return library, quantize or None, device or None


def bench(
    backends: str | Sequence[str] | None = None,
    model: str | Path | None = None,
    *,
    dtypes: str | Sequence[str] = ("float32",),
    context: int | Sequence[int] | None = None,
    batch: int | Sequence[int] = (1,),
    max_tokens: int | None = None,
    rounds: int = 7,
    threads: int | None = None,
    progress: StageProgress = no_stage_progress,
) -> Benchmark:
    """Measure how fast one model is on several backends, which take turns; return a `Benchmark`.

    `backends` are names such as "numpy", "numpy+int8" (quantized) and "torch@cuda" (a device). None takes all backends
    that can be used here, except array-api-strict. `model` is as for `load`. Each number of prompt tokens in `context`
    (None: three that suit the model) is combined with each number of prompts in `batch`. From each prompt `max_tokens`
    are generated (None: 17, or as many as fit the context). One value may be given in place of a list. `rounds` is the
    number of turns. `threads` (None: the number of cores) limits those of the CPU. `progress(stage)` returns a context
    that is entered while that stage runs.

    Raises `SettingError` for values that make no sense, `BackendError` where a backend is unknown or not installed, and
    the errors of `load` where the model is not found. A backend that fails in its process is in its `ContenderResult`.
    """
    backends = None if backends is None else listed(backends)
    context = None if context is None else listed(context)
    dtypes, batch = listed(dtypes), listed(batch)
    _check(backends, dtypes, batch, rounds)
    folder = find_model(model)
    config = read_config(folder)
    workloads = _workloads(config, context, batch, max_tokens)
    names = _default_backends() if backends is None else backends
    specs = [gpt_xp_spec(folder, name, dtype) for name in names for dtype in dtypes]
    return run_benchmark(
        str(model or default_model()), [*specs, floor_spec(folder)], workloads, config.n_vocab,
        rounds=rounds, threads=threads, progress=progress,
    )  # fmt: skip


def _default_backends() -> list[str]:
    """Return the usable backends except array-api-strict. NumPy is first, because ratios are to the first."""
    return sorted(set(usable_backends()) - {"array-api-strict"}, key=lambda name: (name != "numpy", name))


def default_context(n_ctx: int) -> list[int]:
    """Return a short, a medium and a long prompt's number of tokens: 16, 128 and 512 of 1024."""
    return sorted({max(1, n_ctx // part) for part in (64, 8, 2)})


def _check(backends: Sequence[str] | None, dtypes: Sequence[str], batch: Sequence[int], rounds: int) -> None:
    for what, names in (("backend", backends), ("dtype", dtypes), ("batch", batch)):
        if names is not None and not names:
            raise SettingError(f"no {what} was named, and so there is nothing to measure")
    for name in backends or ():
        library, quantize, _ = _parts(name)
        check_kind(quantize)
        check_installed(library, quantized=quantize is not None)
    check_dtypes(dtypes)
    if min(batch) < 1 or rounds < 1:
        raise SettingError("there must be at least one row in a batch, and at least one round")


def _workloads(
    config: GPT2Config, context: Sequence[int] | None, batch: Sequence[int], max_tokens: int | None
) -> list[Workload]:
    lengths = default_context(config.n_ctx) if context is None else list(dict.fromkeys(context))
    if not lengths or min(lengths) < 1:
        raise SettingError("a prompt must have at least one token")
    # The last token needs no room in the context, because nothing is computed from it.
    room = config.n_ctx - max(lengths) + 1
    if max_tokens is None:
        max_tokens = max(1, min(N_NEW, room))
    if max_tokens < 1:
        raise SettingError(f"max_tokens must be at least 1, not {max_tokens}")
    if max_tokens > room:
        raise SettingError(
            f"max_tokens {max_tokens} after {max(lengths)} tokens of a prompt (context) does not fit the model, which "
            f"takes {config.n_ctx}: take fewer of one"
        )
    return [Workload(length, rows, max_tokens) for rows in dict.fromkeys(batch) for length in lengths]
