"""`gpt-xp bulk`: continue, score or rank the lines of files, in shards that survive a crash."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

import gpt_xp
from gpt_xp.cli.loading import locate, note_default_model
from gpt_xp.cli.options import (
    CONTEXT,
    COUNT,
    SIZE,
    flag,
    json_option,
    loading_options,
    logprobs_option,
    note_no_effect,
    option,
    sampling_options,
    together,
)
from gpt_xp.cli.output import is_terminal, note, write, write_json
from gpt_xp.cli.session import check_settings
from gpt_xp.cli.several import leave_mesh_aside
from gpt_xp.cli.wording import Command, is_from_variable, is_typed
from gpt_xp.jobs.job import FORMATS, Job
from gpt_xp.jobs.run import ENGINES
from gpt_xp.jobs.status import BulkStatus, join, status
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.scoring.rank import MEASURES
from gpt_xp.settings import GenerationSettings

if TYPE_CHECKING:
    from tqdm import tqdm

CONVENTIONS = ("huggingface", "lm-eval")
SCORE_SETTINGS = ("convention", "window", "stride")
EPILOG = """\
The same command goes on with a job that was stopped or killed, and does nothing twice. Several may work on one DIR: on
a GPU and on CPUs (--from-end), or on several machines with a shared file system (--slice).

\b
  gpt-xp bulk -m 124M -n 100 --temperature 1 prompts.jsonl out/
  gpt-xp bulk --status out/
  gpt-xp bulk --join out/ > all.jsonl
"""


kind_options = together(
    flag("--score", help="Print how likely each line is, instead of continuing it."),
    flag("--choices", of="bulk", help="Rank the texts in the field `choices` of each line after its `prompt`."),
    option(
        "--by", metavar="WHAT", type=click.Choice(MEASURES), default=MEASURES[0], show_default=True,
        help="With --choices: rank by the total log-probability, or by the mean per token or per byte.",
    ),
    option(
        "--convention", of="bulk", metavar="NAME", type=click.Choice(CONVENTIONS), default=CONVENTIONS[0],
        show_default=True, help="With --score: how a text is cut into windows, huggingface or lm-eval.",
    ),
    option("--window", metavar="N", type=COUNT, help="With --score: tokens in a window.  [default: the context]"),
    option("--stride", metavar="N", type=COUNT, help="With --score: tokens between windows.  [default: half]"),
)  # fmt: skip
job_options = together(
    option(
        "--format", metavar="FORMAT", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True,
        help="Format of the parts: jsonl, or parquet (which needs pyarrow).",
    ),
    option(
        "--shard-bytes", metavar="SIZE", type=SIZE,
        help="Bytes of the input in a shard, such as 16M.  [default: a thousandth, 4K to 16M]",
    ),
    flag("--strict", of="bulk", help="End at the first line with an error, instead of writing an error record."),
    option(
        "--engine", metavar="NAME", type=click.Choice(ENGINES), default=ENGINES[0], show_default=True,
        help="local (processes of this machine), or ray (the cluster of RAY_ADDRESS, else a local one).",
    ),
    option("--workers", metavar="N", type=COUNT, default=1, show_default=True, help="Workers, each with the model."),
    option("--gpus", metavar="N", type=click.IntRange(min=0), default=0, help="GPUs of each worker."),
    option(
        "--batch-size", metavar="N", type=COUNT, default=8, show_default=True,
        help="Lines to compute at a time; with --choices, choices of a line.",
    ),
    option("--slice", metavar="K/N", help="Compute only the K-th of N shares of the shards, such as 3/64."),
    flag("--from-end", help="Begin with the last shard, beside a job that began with the first."),
    flag("--status", help="Print how far the job in DIR has come."),
    flag("--join", help="Print the records of the job in DIR, in the order of the input."),
    json_option,
)  # fmt: skip


@click.command(cls=Command, context_settings=CONTEXT, epilog=EPILOG)
@click.argument("paths", metavar="FILE... DIR", nargs=-1, type=click.Path())
@loading_options
@sampling_options
@kind_options
@logprobs_option
@job_options
@click.pass_context
def bulk(
    ctx: click.Context,
    /,
    paths: Sequence[str],
    status: bool,
    join: bool,
    as_json: bool,
    score: bool,
    choices: bool,
    **options: Any,
) -> None:
    """Continue each line of FILEs, and write the records to DIR, in parts that survive a crash.

    A FILE has a prompt on each line, or a JSON object with a text `prompt` (--score: `text`), whose other fields come
    back as `input`. It may be compressed with gzip. A line that cannot be computed has an error record in its place,
    and the exit code is then 1.
    """
    if status or join:
        _show(ctx, paths, join, as_json)
        return
    if len(paths) < 2:
        raise click.UsageError("give at least one FILE of prompts, and the DIR to write to as the last argument")
    if score and choices:
        raise click.UsageError("give --score or --choices, not both")
    leave_mesh_aside(ctx, options)
    kind = "score" if score else "choices" if choices else "generate"
    settings = _settings(ctx, kind, options)
    bar = BulkBar()
    try:
        found = gpt_xp.bulk(
            list(paths[:-1]), paths[-1], kind=kind, model=_model(ctx, options), watcher=bar, **settings, **options
        )
    except KeyboardInterrupt:
        note("stopped; the same command goes on")
        raise
    _tell(found, bar.seconds, as_json)
    if found.n_errors:
        failed = _count(found.n_errors, "line")
        note(f"{failed} could not be computed: `gpt-xp bulk --status {paths[-1]}` names the parts")
        ctx.exit(1)


def _settings(ctx: click.Context, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of this kind out of the options. Raises a usage error for a given one of another kind."""
    sampling = [name for name in GenerationSettings.__dataclass_fields__ if name not in ("seed", "special_tokens")]
    of_kind = {"generate": sampling, "score": [*SCORE_SETTINGS], "choices": ["by"]}
    chosen = {"special_tokens": options.pop("special_tokens")}
    for owner, names in of_kind.items():
        for name in names:
            value = options.pop(name)
            if owner == kind:
                chosen[name] = value
            elif is_typed(ctx, name):
                goes = "without --score and --choices" if owner == "generate" else f"with --{owner}"
                raise click.UsageError(f"--{name.replace('_', '-')} goes {goes}")
    if kind == "generate":
        check_settings({**chosen, "seed": options["seed"]})
        if chosen["temperature"] == 0:
            note_no_effect(ctx, ("top_k", "top_p", "min_p", "seed"), "without a temperature: add --temperature 1")
    elif kind == "score" and chosen["convention"] == "lm-eval" and is_from_variable(ctx, "stride"):
        chosen["stride"] = None
    return chosen


def _model(ctx: click.Context, options: dict[str, Any]) -> str | None:
    """Take gpt-xp's and picoGPT's options that name the model out of the options; return its name."""
    model, size, folder = (options.pop(name) for name in ("model", "model_size", "models_dir"))
    if (size, folder) != (None, None):
        if is_from_variable(ctx, "model"):
            model = None
        if model is not None:
            raise click.UsageError("give --model, or picoGPT's --model_size and --models_dir, not both")
        return str(locate(None, options["offline"], size, folder)[1]) if folder is not None else str(size)
    if model is None:
        note_default_model()
    return None if model is None else str(model)


def _show(ctx: click.Context, paths: Sequence[str], joined: bool, as_json: bool) -> None:
    """Print the state of a job, or its records."""
    if ctx.params["status"] and joined:
        raise click.UsageError("give --status or --join, not both")
    if len(paths) != 1:
        raise click.UsageError(f"--{'join' if joined else 'status'} takes the DIR of one job, not {len(paths)} paths")
    if joined:
        for block in join(paths[0]):
            write(block.decode("ascii"))
        return
    found = status(paths[0])
    if as_json:
        write_json(_fields(found))
        return
    percent = 100 * found.done_bytes / max(found.bytes, 1)
    write(f"{found.done} of {found.shards} shards are done, {percent:.1f}% of the input\n")
    if found.errors:
        write(f"{_count(found.n_errors, 'error record')}:\n")
        write("".join(f"  {path}: {count}\n" for path, count in found.errors.items()))


def _tell(found: BulkStatus, seconds: float, as_json: bool) -> None:
    """Print what this call has done: a line on stderr, or JSON on stdout."""
    if as_json:
        write_json(_fields(found) | {"prompts": found.prompts, "seconds": seconds})
    rate = f" in {seconds:.1f} s, {found.prompts / seconds:.1f} prompts/s" if found.prompts and seconds else ""
    errors = f"; {_count(found.n_errors, 'error record')}" if found.errors else ""
    note(
        f"{found.done} of {_count(found.shards, 'shard')} done in {found.directory}; "
        f"{_count(found.prompts, 'prompt')} now{rate}{errors}"
    )


def _fields(found: BulkStatus) -> dict[str, Any]:
    fields = dataclasses.asdict(found) | {"directory": str(found.directory)}
    del fields["prompts"]
    return fields


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class BulkBar(Watcher):
    """Shows a job on stderr: a bar on a terminal, with prompts a second and the time left."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._prompts, self._warned = 0, False
        self._since = time.monotonic()
        self.seconds = 0.0  # since the first worker had loaded the model

    def begins(self, job: Job, status: BulkStatus) -> None:
        """Write the seed and what is done already, and start the bar."""
        from tqdm import tqdm

        if job.settings.get("temperature"):
            note(f"seed {job.seed}")
        if status.done:
            note(f"going on: {status.done} of {status.shards} shards are done")
        self._since = time.monotonic()
        self._bar = tqdm(
            total=status.bytes, initial=status.done_bytes, dynamic_ncols=True, leave=False, smoothing=0.05,
            disable=not is_terminal(sys.stderr),
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def loaded(self, warnings: Sequence[str]) -> None:
        """Write the warnings of the first worker; those of the others are the same."""
        if not self._warned:
            self._warned, self._since = True, time.monotonic()
            for each in warnings:
                note(each)

    def worker_ended(self, reason: str) -> None:
        """Write why a worker has ended."""
        note(f"a worker has ended and is started again: {reason}")

    def advanced(self, prompts: int, n_bytes: int) -> None:
        """Move the bar; tqdm draws it at most ten times a second."""
        self._prompts += prompts
        if self._bar is not None:
            rate = self._prompts / max(time.monotonic() - self._since, 1e-9)
            self._bar.set_postfix_str(f"{self._prompts} prompts, {rate:.1f} prompts/s", refresh=False)
            self._bar.update(n_bytes)

    def ends(self) -> None:
        """Remove the bar."""
        self.seconds = time.monotonic() - self._since
        if self._bar is not None:
            self._bar.close()
