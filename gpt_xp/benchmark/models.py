"""A benchmark of one model on the backends that are here: what `gpt-xp bench` runs."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_xp.backend import check_installed
from gpt_xp.benchmark.driver import Benchmark, Entry, Progress, race
from gpt_xp.benchmark.figures import N_NEW, Workload
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.comparison.driver import DTYPES
from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.processes import own_command, usable_backends
from gpt_xp.quantization import check_kind
from gpt_xp.reporting.text import listed


def own_entry(
    model: str | Path, backend: str, dtype: str = "float32", *, name: str | None = None, **options: Any
) -> Entry:
    """Return gpt-xp on one backend as a contender; `model` is a directory.

    `backend` is a name, with "+int8" behind it for weights that are quantized so, and "@cuda" for a device. `options`
    are further arguments of `contenders.GptXp`, such as `sampling={"temperature": 0.8}`.
    """
    library, quantize, device = _parts(backend)
    job = {"model": str(model), "backend": library, "device": device, "dtype": dtype, "quantize": quantize, **options}
    return _entry(name or f"{backend} {dtype}", "gpt-xp", job)


def floor_entry(model: str | Path) -> Entry:
    """Return the floor: the bare products over the weights in the directory `model`."""
    return _entry("floor", "floor", {"model": str(model)}, is_floor=True)


def _entry(name: str, contender: str, job: dict[str, Any], is_floor: bool = False) -> Entry:
    command = own_command("bench-worker", json.dumps({"contender": contender, **job}))
    return Entry(name, tuple(command), is_floor)


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
    n_new: int | None = None,
    rounds: int = 7,
    threads: int | None = None,
    progress: Progress = lambda what: contextlib.nullcontext(),
) -> Benchmark:
    """Measure one model on several backends in turn, and return how fast each is, beside the floor.

    `backends` are names as for `own_entry` ("numpy", "numpy+int8", "torch@cuda"); None: all that can be used here,
    but for array-api-strict. `model` is as for `load`. Every number of prompt tokens in `context` (None: three that
    suit the model) is combined with every number of prompts in `batch`, and each prompt is continued by `n_new` tokens
    (None: 17, or as many as there is room for). A list of one may be given as it is. The rest is as for `race`.

    Raises `SettingError`, `BackendError` where a backend is unknown or not installed, and the errors of `find_model`.
    """
    backends = None if backends is None else listed(backends)
    context = None if context is None else listed(context)
    dtypes, batch = listed(dtypes), listed(batch)
    _check(backends, dtypes, batch, rounds)
    folder = find_model(model)
    config = read_config(folder)
    workloads = _workloads(config, context, batch, n_new)
    names = _all_here() if backends is None else backends
    entries = [own_entry(folder, name, dtype) for name in names for dtype in dtypes]
    return race(
        str(model or default_model()), [*entries, floor_entry(folder)], workloads, config.n_vocab,
        rounds=rounds, threads=threads, progress=progress,
    )  # fmt: skip


def _all_here() -> list[str]:
    """What can be used here, but for the backend that only checks; NumPy first, for ratios are to the first."""
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
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise SettingError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if min(batch) < 1 or rounds < 1:
        raise SettingError("there must be at least one row in a batch, and at least one round")


def _workloads(
    config: GPT2Config, context: Sequence[int] | None, batch: Sequence[int], n_new: int | None
) -> list[Workload]:
    lengths = default_context(config.n_ctx) if context is None else list(dict.fromkeys(context))
    if not lengths or min(lengths) < 1:
        raise SettingError("a prompt must have at least one token")
    # The last token needs no room: nothing is computed from it.
    room = config.n_ctx - max(lengths) + 1
    if n_new is None:
        n_new = max(1, min(N_NEW, room))
    if n_new < 1:
        raise SettingError(f"n_new must be at least 1, not {n_new}")
    if n_new > room:
        raise SettingError(
            f"n_new {n_new} after {max(lengths)} tokens of a prompt (context) does not fit the model, which takes "
            f"{config.n_ctx}: take fewer of one"
        )
    return [Workload(length, rows, n_new) for rows in dict.fromkeys(batch) for length in lengths]
