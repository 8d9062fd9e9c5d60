"""Return results as the fields of JSON records."""

import math
from collections.abc import Sequence
from typing import Any

from gpt_xp.errors import TokenizerError
from gpt_xp.generation.results import Generation
from gpt_xp.scoring.rank import RankedChoice
from gpt_xp.scoring.score import Score
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tree import finite


def continuation_fields(sample: int, result: Generation, logprobs: bool) -> dict[str, Any]:
    """Return the JSON fields of one continuation."""
    return {
        "sample": sample,
        "text": result.text,
        "token_ids": result.token_ids,
        **({"logprobs": result.logprobs} if logprobs else {}),
        "finish_reason": result.finish_reason,
    }


def score_fields(score: Score) -> dict[str, Any]:
    """Return the figures of a scored text; None for those that are not finite."""
    record = {
        "tokens": len(score.token_ids),
        "scored_tokens": score.n_scored,
        "words": score.n_words,
        "characters": score.n_characters,
        "bytes": score.n_bytes,
        "logprob": score.logprob,
        "nats_per_token": score.nats_per_token,
        "nats_per_character": score.nats_per_character,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "word_perplexity": score.word_perplexity,
        "byte_perplexity": score.byte_perplexity,
    }
    return dict(finite(record))


def choice_fields(choice: RankedChoice) -> dict[str, Any]:
    """Return the figures of a ranked choice."""
    return {
        "index": choice.index,
        "choice": choice.choice,
        "logprob": choice.logprob,
        "logprob_per_token": choice.logprob_per_token,
        "logprob_per_byte": choice.logprob_per_byte,
    }


def token_fields(ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return each token with its text and its log-probability; None where it has none."""
    texts = {id: _text(id, tokenizer) for id in set(ids)}
    return [
        {"id": id, "text": texts[id], "logprob": logprob if math.isfinite(logprob) else None}
        for id, logprob in zip(ids, logprobs, strict=True)
    ]


def _text(id: int, tokenizer: Tokenizer) -> str | None:
    """Return the text of a token; None where it is not whole characters."""
    try:
        return tokenizer.decode([id], errors="strict")
    except TokenizerError:
        return None
