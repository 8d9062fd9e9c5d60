"""Calls that say how a bulk job goes on."""

from collections.abc import Sequence

from gpt_xp.jobs.job import Job
from gpt_xp.jobs.status import BulkStatus


class Watcher:
    """Is told of the progress of a job. Override what you need; every method does nothing here."""

    def begins(self, job: Job, status: BulkStatus) -> None:
        """The job begins, or goes on after what `status` says is done."""

    def loaded(self, warnings: Sequence[str]) -> None:
        """A worker has loaded the model, with these warnings."""

    def advanced(self, prompts: int, n_bytes: int) -> None:
        """More prompts are done, of so many bytes. Both are negative where a worker has ended and starts again."""

    def ends(self) -> None:
        """The job ends, whole or not."""
