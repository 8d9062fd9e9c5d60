"""`gpt-xp --prompt-file`: continue many prompts in batches, and print JSON lines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpt_xp.cli.output import progress_bar, write_json
from gpt_xp.cli.prompt_files import PromptLine
from gpt_xp.cli.report import session_fields, shared_fields, stats_fields
from gpt_xp.cli.session import Session
from gpt_xp.errors import GptXpError, PromptError
from gpt_xp.generation.halving import halved
from gpt_xp.generation.results import Generation, Stats
from gpt_xp.reporting.records import continuation_fields


def refuse_errors(lines: Iterable[PromptLine]) -> None:
    """Raise the error of the first line that has an error."""
    for line in lines:
        if line.error is not None:
            raise PromptError(f"{line.place}: {line.error}")


def checked(session: Session, line: PromptLine) -> PromptLine:
    """Return the line, with an `error` where the model cannot continue its prompt."""
    try:
        if line.prompt is not None and line.error is None:
            session.stream(line.prompt)  # This only checks: text is generated when the iterator is used.
    except GptXpError as error:
        return replace(line, error=str(error))
    return line


@dataclass
class Batches:
    """Continues lines batch by batch, and prints a JSON line for each result, error and batch.

    With `full`, each result has the settings and the statistics of its batch. Without, the settings are the first line,
    and the statistics of a batch follow its results. With `strict`, an error ends everything.
    """

    session: Session
    logprobs: bool
    full: bool
    strict: bool
    stats: list[Stats] = field(default_factory=list)  # of each batch
    n_failed: int = 0  # lines with an error

    def run(self, lines: Sequence[PromptLine], batch_size: int) -> None:
        """Print a line of JSON for each sample of each line, in order."""
        if self.strict:  # All lines are checked before any work is done.
            refuse_errors(checked(self.session, line) for line in lines)
        if not self.full:
            write_json({"type": "settings", **session_fields(self.session)})
        with progress_bar(len(lines), "prompt") as bar:
            for begin in range(0, len(lines), batch_size):
                batch = lines[begin : begin + batch_size]
                self._continue([checked(self.session, line) for line in batch])
                bar.update(len(batch))

    def _continue(self, batch: Sequence[PromptLine]) -> None:
        # Where one of several processes halved a batch, the others would wait for it for ever.
        at_once = self.strict or self.session.model.backend.process_count > 1
        for lines, results in [(batch, self._generate(batch))] if at_once else halved(batch, self._generate):
            if isinstance(results, GptXpError):
                self._print([replace(lines[0], error=str(results))], [])
            else:
                self._print(lines, results)

    def _generate(self, lines: Sequence[PromptLine]) -> list[Generation]:
        return self.session.generate([str(line.prompt) for line in lines if line.error is None])

    def _print(self, batch: Sequence[PromptLine], results: Sequence[Generation]) -> None:
        each = iter(results)
        for line in batch:
            source = {"file": line.file, "line": line.number, "prompt": line.prompt}
            source |= {} if line.input is None else {"input": line.input}
            if line.error is not None:
                self.n_failed += 1
                write_json({"type": "error", **source, "error": line.error})
                continue
            for sample in range(self.session.settings.num_samples):
                result = next(each)
                more = shared_fields(self.session, result) if self.full else {}
                write_json({"type": "result", **source, **continuation_fields(sample, result, self.logprobs), **more})
        if results:
            self.stats.append(results[0].stats)
            if not self.full:
                write_json({"type": "batch", **stats_fields(results[0].stats)})
