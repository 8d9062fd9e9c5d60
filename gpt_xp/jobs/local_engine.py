"""The local engine: workers in processes of this machine, so that a crash ends a worker and not the job."""

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from gpt_xp import errors, json_text
from gpt_xp.errors import BackendError, GptXpError, JsonError
from gpt_xp.jobs.watcher import Watcher
from gpt_xp.jobs.worker import ShardResult, WorkerOptions
from gpt_xp.mesh import LAUNCHERS
from gpt_xp.processes import failure_reason

COMMAND = [sys.executable, "-m", "gpt_xp.jobs.worker_process"]
ALONE = dict.fromkeys(LAUNCHERS, "")  # A worker shares its mesh with no other process that Slurm has started.
MAX_STARTS = 3  # times that a worker may end before it has loaded the model
PATIENCE = 10  # seconds for a process to end


class WorkerEndedError(Exception):
    """A worker's process has ended. The message says why in one line."""


def run_local(
    options: WorkerOptions, numbers: Iterator[int], workers: int, gpus: int, watcher: Watcher
) -> Iterator[ShardResult]:
    """Compute the shards with these numbers with `workers` processes; yield the result of each that is done.

    A worker that ends is started again, and begins its shard again. Raises the errors of `Worker`, and `GptXpError`
    where workers end before they have loaded the model.
    """
    pool = _Pool(options, numbers, watcher)
    threads = [
        threading.Thread(target=pool.serve, args=(_visible_gpus(index, gpus),), daemon=True) for index in range(workers)
    ]
    for thread in threads:
        thread.start()
    running = workers
    try:
        while running:
            event = pool.events.get()
            if event is None:
                running -= 1
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, ShardResult):
                yield event
            else:
                event()  # A call of the watcher, made here because this thread draws the bar.
    finally:
        pool.stop()
        for thread in threads:
            thread.join(PATIENCE)


class _Pool:
    """The state that the threads share, each of which feeds one worker."""

    def __init__(self, options: WorkerOptions, numbers: Iterator[int], watcher: Watcher) -> None:
        self.events: queue.Queue[ShardResult | BaseException | Callable[[], object] | None] = queue.Queue()
        self._options, self._numbers, self._watcher = options, numbers, watcher
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._stopped = False

    def serve(self, variables: dict[str, str]) -> None:
        """Compute shards with one worker until none are left. Errors are put into `events`."""
        process: _Process | None = None
        try:
            while (number := self._next()) is not None:
                result = None
                while result is None:
                    process = process or self._start(variables)
                    try:
                        result = self._compute(process, number)
                    except WorkerEndedError as ended:
                        self.events.put(functools.partial(self._watcher.worker_ended, str(ended)))
                        self._end(process)
                        process = None
                self.events.put(result)
        except BaseException as error:
            if not self._stopped:
                self.events.put(error)
        finally:
            if process is not None:
                self._end(process)
            self.events.put(None)

    def stop(self) -> None:
        """End all workers at once, and start no others."""
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            process.kill()

    def _next(self) -> int | None:
        with self._lock:
            return None if self._stopped else next(self._numbers, None)

    def _start(self, variables: dict[str, str]) -> "_Process":
        reason = ""
        for _ in range(MAX_STARTS):
            with self._lock:
                if self._stopped:
                    raise WorkerEndedError("the job is being stopped")
                process = _Process(variables)
                self._processes.add(process)
            try:
                process.send(asdict(self._options))
                told = process.receive()["warnings"]
                self.events.put(functools.partial(self._watcher.loaded, told))
                return process
            except WorkerEndedError as ended:
                reason = str(ended)
                self._end(process)
            except BaseException:
                self._end(process)
                raise
        raise GptXpError(f"a worker has ended {MAX_STARTS} times before it had loaded the model: {reason}")

    def _compute(self, process: "_Process", number: int) -> ShardResult:
        """Compute a shard; tell the watcher of its prompts. Raises `WorkerEndedError`."""
        prompts = n_bytes = 0
        process.send({"shard": number})
        try:
            while "number" not in (answer := process.receive()):
                prompts, n_bytes = prompts + answer["prompts"], n_bytes + answer["bytes"]
                self._advance(answer["prompts"], answer["bytes"])
        except WorkerEndedError:
            self._advance(-prompts, -n_bytes)  # They are computed again.
            raise
        self._advance(-prompts, -n_bytes)  # The result counts them.
        return ShardResult(**answer)

    def _advance(self, prompts: int, n_bytes: int) -> None:
        self.events.put(functools.partial(self._watcher.advanced, prompts, n_bytes))

    def _end(self, process: "_Process") -> None:
        process.kill()
        process.close()
        with self._lock:
            self._processes.discard(process)


class _Process:
    """A running worker, which speaks the protocol of `worker_process`."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            encoding="utf-8", errors="replace", env=os.environ | ALONE | variables,
        )  # fmt: skip

    def send(self, request: dict[str, Any]) -> None:
        """Send a request. Where the process has ended, `receive` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the next answer. Raises `WorkerEndedError`, and the error that the worker has sent."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json_text.parse(line)
        except JsonError:  # The process has ended, perhaps in the middle of a line.
            raise WorkerEndedError(self._reason()) from None
        if "error" in answer:
            raise getattr(errors, answer["kind"], GptXpError)(answer["error"])
        if "traceback" in answer:
            raise RuntimeError(f"a worker has failed:\n{answer['traceback']}")
        return answer

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a killed process, and close its streams."""
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _reason(self) -> str:
        self._process.kill()
        code = self._process.wait()
        self._stderr.seek(0)
        return failure_reason(self._stderr.read().decode(errors="replace"), code)


def _visible_gpus(index: int, gpus: int) -> dict[str, str]:
    """Return the variable that shows `gpus` GPUs to the worker with this index; none for 0."""
    if not gpus:
        return {}
    first, listed = index * gpus, os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(first + gpus)] if listed is None else listed.split(",")
    chosen = names[first : first + gpus]
    if len(chosen) < gpus:
        raise BackendError(
            f"worker {index + 1} needs {gpus} GPUs beside those of the others, and CUDA_VISIBLE_DEVICES={listed} has "
            f"{len(names)} in all: use fewer workers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
