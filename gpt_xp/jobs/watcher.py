"""Calls that say how a bulk job goes on."""

from collections.abc import Sequence

from gpt_xp.jobs.job import Job
from gpt_xp.jobs.status import BulkStatus


class Watcher:
    """Receives the progress of a job. Override the methods that you need; here they do nothing."""

    def begins(self, job: Job, status: BulkStatus) -> None:
        """Called when the job begins, or goes on; `status` says what is done."""

    def loaded(self, warnings: Sequence[str]) -> None:
        """Called when a worker has loaded the model, with these warnings."""

    def worker_ended(self, reason: str) -> None:
        """Called when a worker has ended in the middle of a shard, and is started again."""

    def advanced(self, prompts: int, n_bytes: int) -> None:
        """Called when more prompts are done. Both numbers are negative where a worker has ended and starts again."""

    def ends(self) -> None:
        """Called when the job ends, whole or not."""
