"""Rank continuations of a prompt by how likely they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_xp.errors import PromptError, SettingError
from gpt_xp.generation.loop import Generator
from gpt_xp.prompts import shared_length
from gpt_xp.scoring.score import Floats, ScoredRow, begin_token, row_logprobs
from gpt_xp.settings import check_count

MEASURES = ("total", "token", "byte")


@dataclass(frozen=True, eq=False)
class RankedChoice:
    """A continuation of a prompt, and how likely it is.

    `choice` is the choice with this `index` in the list that was given. `token_ids` are the n tokens that are scored,
    and `logprobs` [n] their natural log-probabilities in float64.
    """

    index: int
    choice: str | list[int]
    token_ids: list[int]
    logprobs: Floats

    @property
    def logprob(self) -> float:
        """The log-probability of the choice; `acc` of lm-evaluation-harness ranks by it."""
        return float(self.logprobs.sum())

    @property
    def logprob_per_token(self) -> float:
        """The mean log-probability of its tokens, so that long choices are not at a disadvantage."""
        return self.logprob / len(self.token_ids)

    @property
    def logprob_per_byte(self) -> float | None:
        """The log-probability divided by its UTF-8 bytes, without the space before it; None for token ids.

        `acc_norm` of lm-evaluation-harness ranks by this. It counts characters, which is the same in ASCII.
        """
        if not isinstance(self.choice, str):
            return None
        return self.logprob / max(len(self.choice.removeprefix(" ").encode()), 1)


def rank_choices(
    generator: Generator,
    prompt: str | list[int],
    choices: Sequence[str | list[int]],
    by: str,
    batch_size: int,
    encode: Callable[[str], list[int]],
) -> list[RankedChoice]:
    """Return the ranked continuations, the likeliest first; see `Model.rank`."""
    check_count("batch_size", batch_size)
    measures: dict[str, Callable[[RankedChoice], Any]] = {
        "total": lambda each: each.logprob,
        "token": lambda each: each.logprob_per_token,
        "byte": lambda each: each.logprob_per_byte,
    }
    if by not in measures:
        raise SettingError(f"by must be one of {', '.join(MEASURES)}, not {by!r}")
    if by == "byte" and not isinstance(prompt, str):
        raise SettingError("by 'byte' needs text, and token ids were given")
    wholes, n_context = _encode_choices(generator, prompt, choices, encode)
    longest, n_ctx = max(map(len, wholes)), generator.decoder.config.n_ctx
    if longest > n_ctx + 1:  # The last token is predicted and not read.
        raise PromptError(
            f"the prompt and its longest choice have {longest} tokens, and this model takes {n_ctx} and "
            f"predicts one more: shorten the prompt by {longest - n_ctx - 1}"
        )
    found = row_logprobs(generator.decoder, [ScoredRow(ids, n_context) for ids in wholes], batch_size)
    ranked = [
        RankedChoice(index, choice, ids[n_context:], logprobs)
        for index, (choice, ids, logprobs) in enumerate(zip(choices, wholes, found, strict=True))
    ]
    return sorted(ranked, key=measures[by], reverse=True)


def _encode_choices(
    generator: Generator, prompt: str | list[int], choices: Sequence[Any], encode: Callable[[str], list[int]]
) -> tuple[list[list[int]], int]:
    """Return the token ids of the prompt with each choice, and the number of first tokens that are not scored.

    Prompt and choice are encoded together. White space at the end of the prompt belongs to the choice, as in
    lm-evaluation-harness's `_encode_pair`, because " yes" is one token while " " and "yes" are two. Where a choice
    changes the last tokens of the prompt (it continues a word), those tokens are scored with every choice.
    """
    if not choices or not all(len(choice) for choice in choices):
        raise PromptError("there must be at least one choice, and none may be empty")
    if isinstance(prompt, str):
        context = encode(prompt.rstrip())
        wholes = [encode(prompt + choice) for choice in choices]
    else:
        context, wholes = prompt, [[*prompt, *choice] for choice in choices]
    n_context = min(shared_length(context, ids) for ids in wholes)
    if n_context:
        return wholes, n_context
    eos = begin_token(generator, "a choice without a prompt before it")
    return [[eos, *ids] for ids in wholes], 1
