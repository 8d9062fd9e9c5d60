"""`gpt-xp --prompt-file`: continue many prompts, some at a time, and print JSON lines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gpt_xp.cli.output import progress, write_json
from gpt_xp.cli.prompt_files import Line
from gpt_xp.cli.report import about, continuation, everything, figures
from gpt_xp.cli.session import Session
from gpt_xp.errors import DeviceMemoryError, GptXpError, NumericalError, PromptError
from gpt_xp.generation.results import Generation, Stats


def refuse_errors(lines: Iterable[Line]) -> None:
    """Raise the error of the first line that has one."""
    for line in lines:
        if line.error is not None:
            raise PromptError(f"{line.place}: {line.error}")


def checked(session: Session, line: Line) -> Line:
    """Return the line, with an `error` if the model cannot continue its prompt."""
    try:
        if line.prompt is not None and line.error is None:
            session.stream(line.prompt)  # checks at once, and generates only when it is iterated
    except GptXpError as error:
        return replace(line, error=str(error))
    return line


@dataclass
class Batches:
    """Continues lines, batch by batch, and prints what comes out: results, errors in their places, statistics.

    With `full`, each result has the settings and the statistics of its batch. Without, the settings are the first line,
    and the statistics of a batch are a line after its results. With `strict`, an error ends it.
    """

    session: Session
    logprobs: bool
    full: bool
    strict: bool
    stats: list[Stats] = field(default_factory=list)  # of each batch
    n_failed: int = 0  # lines

    def run(self, lines: Sequence[Line], batch_size: int) -> None:
        """Print a line of JSON for each sample of each line, in order."""
        if self.strict:
            refuse_errors(checked(self.session, line) for line in lines)  # before any work that could be lost
        if not self.full:
            write_json({"type": "settings", **about(self.session)})
        with progress(len(lines), "prompt") as bar:
            for begin in range(0, len(lines), batch_size):
                batch = lines[begin : begin + batch_size]
                self._continue([checked(self.session, line) for line in batch])
                bar.update(len(batch))

    def _continue(self, batch: Sequence[Line]) -> None:
        try:
            results = self.session.generate([str(line.prompt) for line in batch if line.error is None])
        except (DeviceMemoryError, NumericalError) as error:  # perhaps for one of them alone
            if self.strict:
                raise
            if len(batch) == 1:
                self._print([replace(batch[0], error=str(error))], [])
            else:
                self._continue(batch[: len(batch) // 2])
                self._continue(batch[len(batch) // 2 :])
        else:
            self._print(batch, results)

    def _print(self, batch: Sequence[Line], results: Sequence[Generation]) -> None:
        each = iter(results)
        for line in batch:
            place = {"file": line.file, "line": line.number, "prompt": line.prompt}
            place |= {} if line.input is None else {"input": line.input}
            if line.error is not None:
                self.n_failed += 1
                write_json({"type": "error", **place, "error": line.error})
                continue
            for sample in range(self.session.settings.num_samples):
                result = next(each)
                more = everything(self.session, result) if self.full else {}
                write_json({"type": "result", **place, **continuation(sample, result, self.logprobs), **more})
        if results:
            self.stats.append(results[0].stats)
            if not self.full:
                write_json({"type": "batch", **figures(results[0].stats)})
