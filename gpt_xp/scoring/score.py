"""Score a text: the log-probability of each token, and perplexities."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from gpt_xp.arrays import at_least_float32
from gpt_xp.errors import PromptError, SettingError
from gpt_xp.generation.choosing import not_finite
from gpt_xp.generation.decoder import Decoder
from gpt_xp.generation.loop import Generator
from gpt_xp.generation.sampling import log_probability
from gpt_xp.scoring.windows import Window, Windows
from gpt_xp.settings import check_count
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.transformer import hidden_states, unembed
from gpt_xp.types import Array, Namespace

LOGITS_AT_A_TIME = 2**23  # 32 MB in float32

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
TokensDone = Callable[[int, int], object]  # called with the number of tokens scored so far, and of all to score


@dataclass(frozen=True, eq=False)
class Score:
    """The tokens of a text, and how likely the model finds each of them.

    `token_ids` [n] are ints. `logprobs` [n] are natural log-probabilities in float64, NaN for tokens that no window
    predicts. With "nanogpt" they hold the tokens of all crops, one crop after another.

    `n_words`, `n_characters` and `n_bytes` (UTF-8) count the whole text; words are counted as lm-evaluation-harness
    does, between runs of white space. `n_scored_bytes` counts the bytes of the scored tokens. All four, and the
    figures that need them, are None for a model without a tokenizer. `windows` says how the text was cut.

    Figures per word, character and byte assume that the unscored tokens are like the rest. Otherwise a text would seem
    likelier than it is.
    """

    token_ids: Ints
    logprobs: Floats
    windows: Windows
    n_words: int | None = None
    n_characters: int | None = None
    n_bytes: int | None = None
    n_scored_bytes: int | None = None

    @property
    def n_scored(self) -> int:
        """The number of scored tokens."""
        return int(np.isfinite(self.logprobs).sum())

    @property
    def logprob(self) -> float:
        """The log-probability of all scored tokens together, in nats."""
        return float(np.nansum(self.logprobs))

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy, as `lm_loss` computes it and training reports it."""
        return -self.logprob / self.n_scored

    @property
    def perplexity(self) -> float:
        """The perplexity per token, as on transformers' page."""
        return _exp(self.nats_per_token)

    @property
    def nats_per_character(self) -> float | None:
        """The mean loss per character, to compare with character models."""
        return self._nats_per(self.n_characters)

    @property
    def word_perplexity(self) -> float | None:
        """The perplexity per word: `word_perplexity` of lm-evaluation-harness."""
        nats = self._nats_per(self.n_words)
        return None if nats is None else _exp(nats)

    @property
    def byte_perplexity(self) -> float | None:
        """The perplexity per byte: `byte_perplexity` of lm-evaluation-harness."""
        nats = self._nats_per(self.n_bytes)
        return None if nats is None else _exp(nats)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte: `bits_per_byte` of lm-evaluation-harness."""
        nats = self._nats_per(self.n_bytes)
        return None if nats is None else nats / math.log(2)

    def _nats_per(self, count: int | None) -> float | None:
        if not (count and self.n_bytes and self.n_scored_bytes):
            return None
        return -self.logprob * (self.n_bytes / self.n_scored_bytes) / count


class TokenizedText(NamedTuple):
    """The token ids of a text, and the text itself; None where only ids were given."""

    token_ids: Sequence[int]
    text: str | None = None


def score_texts(
    generator: Generator,
    texts: Sequence[TokenizedText],
    windows: Windows,
    batch_size: int,
    progress: TokensDone | None = None,
) -> list[Score]:
    """Return the `Score` of each text; see `Model.score`. Windows of several texts are computed together."""
    check_count("batch_size", batch_size)
    windows = windows.resolve(generator.decoder.config.n_ctx)
    sequences = [_sequence(generator, each.token_ids, windows) for each in texts]
    cuts = [[w for w in windows.cut(len(each)) if w.first < w.end] for each in sequences]
    rows = [
        ScoredRow(sequence[w.begin : w.end], w.first - w.begin)
        for sequence, cut in zip(sequences, cuts, strict=True)
        for w in cut
    ]
    total, done = sum(len(row.token_ids) - row.n_context for row in rows), 0
    found: list[Floats] = []
    for part in row_logprobs(generator.decoder, rows, batch_size):
        found.append(part)
        done += len(part)
        if progress is not None:
            progress(done, total)
    each_found = iter(found)
    return [
        _assembled(generator, text, sequence, windows, cut, [next(each_found) for _ in cut])
        for text, sequence, cut in zip(texts, sequences, cuts, strict=True)
    ]


def _sequence(generator: Generator, token_ids: Sequence[int], windows: Windows) -> Ints:
    """Return the token ids that windows are cut from. Raises `PromptError` where there is nothing to score."""
    ids = np.asarray(token_ids, dtype=np.int32)
    if windows.convention == "lm-eval" and ids.size:
        ids = np.concatenate([[begin_token(generator, "the convention lm-eval")], ids]).astype(np.int32)
    _check_length(len(ids), windows)
    return ids


def _assembled(
    generator: Generator, text: TokenizedText, sequence: Ints, windows: Windows, cut: Sequence[Window],
    found: Sequence[Floats],
) -> Score:  # fmt: skip
    """Return the score of a text from the log-probabilities of its windows."""
    ids = np.asarray(text.token_ids, dtype=np.int32)
    if windows.convention == "nanogpt":
        scored, logprobs = np.concatenate([sequence[w.first : w.end] for w in cut]), np.concatenate(found)
    else:
        scored, logprobs = ids, np.full(len(sequence), np.nan)
        for window, part in zip(cut, found, strict=True):
            logprobs[window.first : window.end] = part
        logprobs = logprobs[len(sequence) - len(ids) :]
    result = Score(scored, logprobs, windows)
    return result if generator.tokenizer is None else _with_counts(result, ids, generator.tokenizer, text.text)


def _with_counts(score: Score, ids: Ints, tokenizer: Tokenizer, text: str | None) -> Score:
    sizes = {id: len(tokenizer.token_bytes(id)) for id in np.unique(ids).tolist()}
    if tokenizer.add_bos_token and tokenizer.bos_token_id is not None:
        sizes[tokenizer.bos_token_id] = 0  # The tokenizer adds this token; it is not part of the text.
    whole = sum(sizes[id] for id in ids.tolist())
    scored = sum(sizes[id] for id in score.token_ids[np.isfinite(score.logprobs)].tolist())
    n_bytes = whole if text is None else len(text.encode())
    text = tokenizer.decode(ids) if text is None else text
    return replace(
        score,
        n_words=len(re.split(r"\s+", text)),
        n_characters=len(text),
        n_bytes=n_bytes,
        # A tokenizer may add a space before a text, or remove white space beside an added token.
        n_scored_bytes=scored if whole == n_bytes else round(scored * n_bytes / max(whole, 1)),
    )


class ScoredRow(NamedTuple):
    """A row of token ids; those after the first `n_context` (at least 1) are scored."""

    token_ids: Sequence[int] | Ints
    n_context: int


def label_logprobs(x: Array, places: Array, labels: Array, wte: Array, xp: Namespace) -> Array:
    """Return the log-probabilities [n], in at least float32, of `labels` [n] after positions `places` [n] of `x`.

    `x` [batch, n_seq, n_embd] are hidden states; `places` count the positions of all rows, one row after another.
    """
    rows = xp.take(xp.reshape(x, (-1, x.shape[-1])), places, axis=0)  # [batch, n_seq, n_embd] -> [n, n_embd]
    return log_probability(at_least_float32(unembed(rows, wte, xp), xp), labels, xp)


def row_logprobs(decoder: Decoder, rows: Sequence[ScoredRow], batch_size: int) -> Iterator[Floats]:
    """Yield the log-probabilities of the scored tokens of each row, computed `batch_size` rows at a time.

    Raises `NumericalError` where the model's logits are not finite.
    """
    reader = Reader(decoder)
    # All batches have one shape, so that a compiler compiles once. Padding comes after the tokens and changes nothing.
    n_batches = math.ceil(len(rows) / batch_size)
    n_rows = decoder.backend.full_batch(math.ceil(len(rows) / n_batches))
    shape = n_rows, max(len(row.token_ids) for row in rows) - 1
    for begin in range(0, len(rows), shape[0]):
        batch = rows[begin : begin + shape[0]]
        tokens, labels = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for (ids, n_context), read, predicted in zip(batch, tokens, labels, strict=False):
            read[: len(ids) - 1] = ids[:-1]
            predicted[n_context - 1 : len(ids) - 1] = ids[n_context:]
        logprobs = reader.logprobs(tokens, labels)
        for (ids, n_context), found in zip(batch, logprobs, strict=False):
            yield found[n_context - 1 : len(ids) - 1]


class Reader:
    """Computes log-probabilities with a decoder's model; logits stay on the device, a limited number at a time."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._backend = decoder, decoder.backend
        self._pads = self._backend.padded_length(1, 2) > 1  # The backend compiles, and needs arrays of one shape.
        self._hidden_states = self._backend.compile(hidden_states, static=("config", "xp"), donate=("cache",))
        self._label_logprobs = self._backend.compile(label_logprobs, static=("xp",))

    def logprobs(self, tokens: Any, labels: Ints) -> Floats:
        """Return the log-probability [batch, n_seq] of the label after each token; NaN where a label is below 0."""
        decoder = self._decoder
        found = np.full(labels.shape, np.nan)
        tokens, cache = decoder.start(tokens)
        while (begin := cache.position) < tokens.shape[1]:
            chunk, cache = decoder.next_chunk(tokens, cache)
            x, cache = self._hidden_states(
                decoder.params, chunk, config=decoder.config, cache=cache, xp=self._backend.xp
            )
            cache = cache._replace(position=begin + chunk.shape[1])
            row, place = np.nonzero(labels[:, begin : begin + chunk.shape[1]] >= 0)
            found[row, begin + place] = self._of_labels(x, row * x.shape[1] + place, labels[row, begin + place])
        if not np.isfinite(found[labels >= 0]).all():
            raise not_finite(self._backend)
        return found

    def _of_labels(self, x: Array, places: Ints, labels: Ints) -> Floats:
        """Return the log-probabilities of `labels` [n] after positions `places` [n] of hidden states `x`."""
        backend, found, n_rows = self._backend, np.empty(len(places)), x.shape[0] * x.shape[1]
        size = math.ceil(n_rows / math.ceil(n_rows * self._decoder.config.n_vocab / LOGITS_AT_A_TIME))
        for begin in range(0, len(places), size):
            part = slice(begin, begin + size)
            missing = size - len(places[part]) if self._pads else 0
            logprobs = self._label_logprobs(
                x,
                *(backend.asarray(np.pad(ids[part], (0, missing)).astype(np.int32)) for ids in (places, labels)),
                wte=self._decoder.params["wte"],
                xp=backend.xp,
            )
            found[part] = backend.to_numpy(logprobs)[: len(places[part])]
        return found


def begin_token(generator: Generator, what: str) -> int:
    """Return the token that begins a text. Raises `SettingError` where the model has none; `what` needs it."""
    if generator.first_token is None:
        raise SettingError(f"{what} is predicted from the token that begins a text (bos_token_id): this model has none")
    return generator.first_token


def _check_length(n: int, windows: Windows) -> None:
    """Raise `PromptError` where a text of `n` tokens has no token to score."""
    if n == 0:
        raise PromptError("the text is empty: there is nothing to score")
    if windows.convention == "nanogpt" and n <= (windows.window or 0):
        raise PromptError(
            f"the text has {n} tokens, and a crop takes {(windows.window or 0) + 1}: take a smaller window, "
            "another convention, or a longer text"
        )
    if n == 1:
        raise PromptError(
            "the text is one token, and nothing before it predicts it: the convention lm-eval predicts it from the "
            "first token of a text, bos_token_id"
        )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
