"""Compute the records of lines: continuations, scores, or ranked choices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gpt_xp.errors import GptXpError, PromptError, TextError, TokenizerError
from gpt_xp.generation.halving import halved
from gpt_xp.jobs.job import Job
from gpt_xp.jobs.shards import Line
from gpt_xp.model import Model
from gpt_xp.reporting.records import choice_fields, continuation_fields, score_fields, token_fields
from gpt_xp.scoring.score import Score
from gpt_xp.settings import GenerationSettings

Record = dict[str, Any]
Outcome = list[Record] | GptXpError  # the records of one line, or its error
REFUSALS = (PromptError, TextError, TokenizerError)  # errors of one line; others end the job


class Row(NamedTuple):
    """A line that can be computed: its place in its window, its text, its seed, and its choices."""

    place: int
    text: str
    seed: int
    choices: list[str]


class Task:
    """Computes the records of the lines of a job with a model, `batch_size` lines at a time."""

    def __init__(self, job: Job, model: Model, batch_size: int) -> None:
        self._model, self._batch_size, self._kind = model, batch_size, job.kind
        self._settings = dict(job.settings)
        self._logprobs = self._settings.pop("logprobs", False)
        self._compute: Callable[[Sequence[Row]], list[Outcome]] = {
            "generate": self._continue,
            "score": self._score,
            "choices": lambda rows: [self._alone(self._rank, row) for row in rows],
        }[job.kind]
        self._generation = GenerationSettings(**self._settings) if job.kind == "generate" else None
        self._is_sampled = self._generation is not None and self._generation.temperature > 0

    def outcomes(self, lines: Sequence[Line], seeds: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Yield the place of each line without an error, and its outcome; texts of similar length come together."""
        rows = [
            Row(place, str(line.content.text), seed, line.content.choices or [])
            for place, (line, seed) in enumerate(zip(lines, seeds, strict=True))
            if line.content.error is None
        ]
        rows.sort(key=lambda row: len(row.text), reverse=True)  # The largest batch fails first, if one fails.
        n_failed = 0
        for begin in range(0, len(rows), self._batch_size):
            for part, outcomes in halved(rows[begin : begin + self._batch_size], self._compute):
                each = [outcomes] if isinstance(outcomes, GptXpError) else outcomes
                if isinstance(outcomes, GptXpError):
                    n_failed += 1
                    if n_failed == len(rows) > 1:  # The machine or the dtype is at fault, and not a line.
                        raise outcomes
                yield from zip((row.place for row in part), each, strict=True)

    def _continue(self, rows: Sequence[Row]) -> list[Outcome]:
        assert self._generation is not None
        try:
            return self._generate(rows)
        except REFUSALS:  # Nothing is computed yet, because all prompts are checked first.
            refused = {row.place: error for row in rows if (error := self._refusal(row)) is not None}
        good = iter(self._generate([row for row in rows if row.place not in refused]))
        return [refused[row.place] if row.place in refused else next(good) for row in rows]

    def _generate(self, rows: Sequence[Row]) -> list[Outcome]:
        assert self._generation is not None
        settings, samples = replace(self._generation, seed=[row.seed for row in rows]), self._generation.num_samples
        results = self._model.generate([row.text for row in rows], settings)
        return [
            [
                continuation_fields(sample, results[index * samples + sample], self._logprobs)
                | ({"seed": row.seed} if self._is_sampled else {})
                for sample in range(samples)
            ]
            for index, row in enumerate(rows)
        ]

    def _refusal(self, row: Row) -> GptXpError | None:
        assert self._generation is not None
        try:
            self._model.stream(row.text, self._generation)  # This only checks: the iterator is not used.
        except REFUSALS as error:
            return error
        return None

    def _alone(self, compute: Callable[[Row], list[Record]], row: Row) -> Outcome:
        try:
            return compute(row)
        except REFUSALS as error:
            return error

    def _score(self, rows: Sequence[Row]) -> list[Outcome]:
        try:
            scores = self._model.score_each([row.text for row in rows], batch_size=self._batch_size, **self._settings)
        except REFUSALS as error:  # Nothing is computed yet, because all texts are checked first.
            return [error] if len(rows) == 1 else [outcome for row in rows for outcome in self._score([row])]
        return [[self._score_record(score)] for score in scores]

    def _score_record(self, score: Score) -> Record:
        fields = score_fields(score)
        if self._logprobs and self._model.tokenizer is not None:
            ids, logprobs = score.token_ids.tolist(), score.logprobs.tolist()
            fields["per_token"] = token_fields(ids, logprobs, self._model.tokenizer)
        return fields

    def _rank(self, row: Row) -> list[Record]:
        ranked = self._model.rank(row.text, row.choices, batch_size=self._batch_size, **self._settings)
        choices = [choice_fields(each) for each in ranked]
        if self._logprobs and self._model.tokenizer is not None:
            for choice, each in zip(choices, ranked, strict=True):
                choice["per_token"] = token_fields(each.token_ids, each.logprobs.tolist(), self._model.tokenizer)
        return [{"best": ranked[0].index, "choices": choices}]
