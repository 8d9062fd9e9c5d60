"""`gpt_xp.bulk`: run a job, or go on with it."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.errors import GptXpError, SettingError
from gpt_xp.hub.find import default_model, find_model
from gpt_xp.jobs.inputs import find_inputs
from gpt_xp.jobs.job import FORMATS, KINDS, Job, begin_job, forget_job, model_digest, model_stamp
from gpt_xp.jobs.local_engine import run_local
from gpt_xp.jobs.parts import Parts
from gpt_xp.jobs.shards import Shards
from gpt_xp.jobs.status import BulkStatus, numbers_of, status_of
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.jobs.worker import ShardResult, WorkerOptions
from gpt_xp.jobs.writers import check_format
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.mesh import parse_mesh
from gpt_xp.quantization import check_kind
from gpt_xp.registry import check_installed, default_backend
from gpt_xp.scoring.rank import MEASURES
from gpt_xp.scoring.windows import Windows
from gpt_xp.settings import GenerationSettings, check_count, merged

ENGINES = ("local", "ray")
# A shard is a thousandth of the input: minutes of work in large jobs, and bars that move in small ones.
SHARDS, LEAST_BYTES, MOST_BYTES = 1000, 1 << 12, 1 << 24
MAX_GIVEN_UP = 3  # shards in a row that end their workers three times each


def bulk(
    inputs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = "generate",
    model: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    seed: int | None = None,
    logprobs: bool = False,
    format: str = "jsonl",
    shard_bytes: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    mesh: str | None = None,
    threads: int | None = None,
    offline: bool = False,
    batch_size: int = 8,
    engine: str = "local",
    workers: int = 1,
    gpus: int = 0,
    slice: str | None = None,
    from_end: bool = False,
    strict: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> BulkStatus:
    """Continue, score or rank the lines of files, in shards that survive a crash; return the state of the job.

    `inputs` are files of text or JSON lines, plain or gzip. `out` is a directory, which gets a part for each shard of
    the input. The same call goes on with a job that was stopped or killed.

    These make the job, and a later call must give the same: `kind` "generate", "score" or "choices"; `model`, `dtype`
    and `quantize` as in `load`; the `settings` of the kind; `logprobs`; `format` "jsonl" or "parquet"; `shard_bytes`
    (default: a thousandth of the input, at least 4 KiB and at most 16 MiB); `seed` (default: that of the job, drawn
    when it began). Settings are the fields of `GenerationSettings`; or `convention`, `window`, `stride` and
    `special_tokens` as in `Model.score`; or `by` and `special_tokens` as in `Model.rank`.

    The others may change while a job is under way: `backend`, `device`, `mesh` (of each worker), `threads` and
    `offline` as in `load`; `batch_size`; `engine` "local" (processes of this machine) or "ray"; `workers`, each with
    `gpus` GPUs; `slice`, such as "3/64", for the third of 64 shares; `from_end` to begin with the last shard. `strict`
    ends the job at the first line with an error, instead of writing an error record.

    Raises `SettingError`, `TextError` and `PromptError` before any work; the errors of `load`; `CheckpointError` where
    the disk is full.
    """
    _check(kind, dtype, quantize, format, shard_bytes, seed, batch_size, threads, engine, workers, gpus)
    chosen = job_settings(kind, logprobs, settings)
    backend = backend or default_backend()
    check_installed(backend, bool(quantize))
    if mesh is not None:
        parse_mesh(mesh)  # Its error comes before anything is written.
    files = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found, directory, name = find_inputs(files, kind), Path(out), str(model or default_model())
    folder = find_model(name, offline=offline)
    if kind == "score":
        Windows(chosen["convention"], chosen["window"], chosen["stride"]).resolve(read_config(folder).n_ctx)
    size, stamp = sum(each.size for each in found), model_stamp(folder)
    job = Job(
        kind=kind, model=name, digest=model_digest(folder), dtype=dtype, quantize=quantize, settings=chosen,
        format=format, shard_bytes=int(shard_bytes or min(max(size // SHARDS, LEAST_BYTES), MOST_BYTES)),
        seed=secrets.randbits(32) if seed is None else int(seed), inputs=found,
    )  # fmt: skip
    numbers_of(0, slice)  # Its error comes before anything is written.
    job, is_new = begin_job(directory, job, has_seed=seed is not None)
    options = WorkerOptions(
        out=str(directory.absolute()), folder=str(folder.absolute()), run=secrets.token_hex(8), backend=backend,
        device=device, mesh=mesh, threads=threads or _fair_threads(engine, workers), offline=offline,
        batch_size=batch_size, strict=strict, stamp=stamp,
    )  # fmt: skip
    numbers = numbers_of(len(Shards(job)), slice, from_end)
    try:
        return _run(job, directory, options, numbers, engine, workers, gpus, watcher or Watcher())
    except GptXpError:
        if is_new and not any(each.is_dir() for each in directory.iterdir()):  # No worker has begun a shard.
            forget_job(directory)
        raise


def _run(
    job: Job, out: Path, options: WorkerOptions, numbers: range, engine: str, workers: int, gpus: int, watcher: Watcher
) -> BulkStatus:
    parts, shards, prompts = Parts(out, job.format), Shards(job), 0
    before = status_of(out, job, numbers)
    watcher.begins(job, before)
    try:
        if not before.is_complete:
            done, _ = parts.scan()
            missing = (n for n in numbers if n not in done and not parts.is_done(n))
            with contextlib.closing(_engine(engine)(options, missing, workers, gpus, watcher)) as results:
                for result in _guarded(results, options.batch_size):
                    prompts += result.prompts
                    watcher.advanced(result.prompts, shards[result.number].n_bytes)
    finally:
        watcher.ends()
    if status_of(out, job, range(len(shards))).is_complete:
        parts.remove_leftovers()
    return status_of(out, job, numbers, prompts)


def _guarded(results: Iterator[ShardResult], batch_size: int) -> Iterator[ShardResult]:
    """Yield the results. Raises `GptXpError` where all workers end again and again, which no line can cause."""
    given_up = 0
    for result in results:
        given_up = given_up + 1 if result.how == "given up" else 0
        yield result
        if given_up == MAX_GIVEN_UP:
            raise GptXpError(
                f"{MAX_GIVEN_UP} shards in a row, the last of them {result.number}, have each ended their worker three "
                f"times: the machine may have too little memory for {batch_size} lines at a time (batch_size). The "
                "lines of these shards have errors; delete their parts to compute them again"
            )


def _engine(name: str) -> Any:
    if name == "local":
        return run_local
    from gpt_xp.jobs.ray_engine import run_ray

    return run_ray


def job_settings(kind: str, logprobs: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a kind as values that JSON can hold. Raises `SettingError` for those that are invalid."""
    if kind == "generate":
        chosen = merged(None, settings)
        fields = (name for name in GenerationSettings.__dataclass_fields__ if name != "seed")
        values = {name: _plain(getattr(chosen, name)) for name in fields}
        return values | {"stop": list(chosen.stop_strings), "logprobs": logprobs}
    defaults: dict[str, Any] = {"special_tokens": False}
    defaults |= {"by": "total"} if kind == "choices" else {"convention": "huggingface", "window": None, "stride": None}
    for name in settings.keys() - defaults.keys():
        raise TypeError(f"a job of kind {kind!r} has no setting {name!r}; it has: {', '.join(defaults)}")
    values = defaults | settings
    if kind == "choices" and values["by"] not in MEASURES:
        raise SettingError(f"by must be one of {', '.join(MEASURES)}, not {values['by']!r}")
    if values.get("convention") == "nanogpt":
        raise SettingError("convention must be huggingface or lm-eval: nanogpt's random crops need one long text")
    return values | {"logprobs": logprobs}


def _plain(value: Any) -> Any:
    """Return a number of any library as Python's, which JSON can hold."""
    if isinstance(value, Real) and not isinstance(value, bool | float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _check(
    kind: str, dtype: str, quantize: str | None, format: str, shard_bytes: int | None, seed: int | None,
    batch_size: int, threads: int | None, engine: str, workers: int, gpus: int,
) -> None:  # fmt: skip
    for name, value, known in (
        ("kind", kind, KINDS),
        ("dtype", dtype, ITEM_SIZE),
        ("format", format, FORMATS),
        ("engine", engine, ENGINES),
    ):
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    check_kind(quantize)
    if isinstance(seed, list | tuple):
        raise SettingError("seed must be one whole number: a job derives the seed of each line from it")
    GenerationSettings(seed=seed)
    check_count("batch_size", batch_size)
    check_count("workers", workers)
    if shard_bytes is not None:
        check_count("shard_bytes", shard_bytes)
    if threads is not None:
        check_count("threads", threads)
    if gpus:
        check_count("gpus", gpus)
    check_format(format)
    if engine == "ray":
        from gpt_xp.jobs.ray_engine import check_ray

        check_ray()


def _fair_threads(engine: str, workers: int) -> int | None:
    """Return the threads of each of several local workers: a share of the processors; None for one worker."""
    if engine != "local" or workers == 1:
        return None
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // workers)
