"""The Ray engine: workers are actors of Ray Data. Only this module imports Ray.

Ray places the workers, starts them again when they end, and hands out shards. Everything else is the same as on the
local engine.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt_xp import errors
from gpt_xp.errors import GptXpError, SettingError
from gpt_xp.installation import install_command
from gpt_xp.jobs.job import read_job
from gpt_xp.jobs.parts import MAX_ATTEMPTS, Parts
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.jobs.worker import ShardResult, Worker, WorkerOptions
from gpt_xp.processes import one_line

MAX_BLOCKS = 10_000  # Ray keeps an object for each; a block of a larger job has several shards.
# Variables of the cluster that this module starts.
VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Otherwise Ray replaces 127.0.0.1 by the machine's own address.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's log goes to the stderr of this process too.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Without it, Ray writes a line about a future version.
}


def check_ray() -> None:
    """Raise `SettingError` where Ray Data is not installed."""
    for module in ("ray", "pyarrow"):
        if importlib.util.find_spec(module) is None:
            raise SettingError(f"engine ray needs {module}, which is not installed: {install_command('ray')}")


def run_ray(
    options: WorkerOptions, numbers: Iterator[int], workers: int, gpus: int, watcher: Watcher
) -> Iterator[ShardResult]:
    """Compute the shards with these numbers on Ray; yield the result of each that is done.

    It connects to the cluster that this process uses or `RAY_ADDRESS` names, and else starts one on this machine. An
    actor that ends is started again. Raises the errors of `Worker`.
    """
    shards = [{"shard": number} for number in numbers]
    if not shards:
        return
    with _cluster(workers * (options.threads or 1)) as ray, _quiet_data(ray):
        _check_place(ray, options.threads or 1, gpus)
        strategy = ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=1)
        results = ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_BLOCKS)).map_batches(
            ShardActor, fn_constructor_args=(asdict(options),), batch_size=1, compute=strategy,
            num_cpus=options.threads or 1, num_gpus=gpus,
        )  # fmt: skip
        watcher.loaded(())
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            for values in zip(*batch.values(), strict=True):
                result = dict(zip(batch, values, strict=True))
                if result.pop("kind"):
                    raise getattr(errors, result["how"], GptXpError)(result["error"])
                figures = {name: int(result[name]) for name in ("number", "prompts")}
                yield ShardResult(how=result["how"], **figures)


def _check_place(ray: Any, cpus: int, gpus: int) -> None:
    """Raise `SettingError` where no machine of the cluster has a place for a worker. Ray would wait for ever."""
    found = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    if not any(each.get("CPU", 0) >= cpus and each.get("GPU", 0) >= gpus for each in found):
        has = ", ".join(f"{each.get('CPU', 0):.0f} CPUs and {each.get('GPU', 0):.0f} GPUs" for each in found)
        raise SettingError(f"a worker asks for {cpus} CPUs (threads) and {gpus} GPUs (gpus), and Ray has {has}")


class ShardActor:
    """A worker on Ray. It loads the model for its first shard, so that an error becomes a result and ends the job."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = WorkerOptions(**options)
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Compute the shards of a batch."""
        rows = [self._row(int(number)) for number in batch["shard"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, number: int) -> dict[str, Any]:
        try:
            return asdict(self._run(number)) | {"kind": "", "error": ""}
        except GptXpError as error:
            row = asdict(ShardResult(number, type(error).__name__))
            return row | {"kind": "error", "error": str(error)}

    def _run(self, number: int) -> ShardResult:
        if self._worker is None:
            # Ray starts an actor again as often as it ends, so that loading must be counted too.
            out = Path(self._options.out)
            parts = Parts(out, read_job(out).format)
            if parts.is_done(number):
                return ShardResult(number, "there")
            loadings = parts.begin_attempt(number, f"loading-{self._options.run}")
            if loadings - parts.n_attempts(number, self._options.run) >= MAX_ATTEMPTS:
                raise GptXpError(f"a worker has ended {MAX_ATTEMPTS} times before it had loaded the model")
            self._worker = Worker(self._options)
        return self._worker.run(number)


@contextmanager
def _cluster(n_processors: int) -> Iterator[Any]:
    """Connect to a cluster, or start one that listens on loopback alone; yield the module `ray`."""
    if os.environ.get("RAY_ADDRESS"):
        import ray

        address: dict[str, Any] = {}
    else:
        with _variables(VARIABLES):
            import ray
        processors = max(os.cpu_count() or 1, n_processors)  # All workers find a place, though not each a processor.
        address = {"address": "local", "include_dashboard": False, "num_cpus": processors}
    if ray.is_initialized():
        yield ray
        return
    with _variables({} if os.environ.get("RAY_ADDRESS") else VARIABLES):
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **address)
        except Exception as error:  # Ray has no error of its own for all that can be wrong with a cluster.
            where = os.environ.get("RAY_ADDRESS") or "this machine"
            raise GptXpError(f"Ray cannot be used on {where} ({one_line(error)}); see RAY_ADDRESS") from error
        try:
            if address and not ray.util.get_node_ip_address().startswith("127."):
                raise SettingError(
                    "Ray was imported before this call and would listen beyond this machine: set "
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before it is imported, or RAY_ADDRESS to a cluster"
                )
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _quiet_data(ray: Any) -> Iterator[None]:
    """Switch off the bars and the log of Ray Data on stderr; gpt-xp has its own."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    levels = {handler: handler.level for handler in logging.getLogger("ray.data").handlers}
    context.enable_progress_bars = context.print_on_execution_start = False
    for handler in levels:
        if isinstance(handler, logging.StreamHandler):  # The other one writes Ray's file.
            handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        for handler, level in levels.items():
            handler.setLevel(level)


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the body runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
