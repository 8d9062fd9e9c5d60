"""Scoring: how likely a model finds a text, token by token, and which of several continuations is the likeliest.

A text longer than the context is read in windows. How they are laid changes the figures by some percent, and published
figures follow one of three conventions:

- "huggingface", transformers' page "Perplexity of fixed-length models": a window slides by `stride` tokens, and each
  position scores the tokens that the one before did not reach. What begins a window without a token before it is not
  predicted: the first token of the text, and at `stride` = `window` the first of every window.
- "lm-eval", `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness: every token is scored, once. The first is
  predicted from the token that begins a text, windows follow each other, and the last reaches back to be as long as
  the rest.
- "nanogpt", `estimate_loss` of nanoGPT's train.py: random crops, in which every token but the first counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from gpt_xp.errors import NumericalError, PromptError, SettingError
from gpt_xp.generation.decoder import Engine
from gpt_xp.generation.sampling import log_probability
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.transformer import at_least_float32, hidden_states, unembed
from gpt_xp.types import Array, Namespace

CONVENTIONS = ("huggingface", "lm-eval", "nanogpt")
MEASURES = ("total", "token", "byte")
LOGITS = 2**23  # computed at a time: 32 MB in float32

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
Progress = Callable[[int, int], object]  # how many tokens are done, and of how many


# --- the text in windows ---------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Tokens `begin` to `end` of a sequence are read together, and those from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True)
class Windows:
    """How a text is cut into windows. Raises `SettingError` for settings that make no sense.

    `window` is the number of tokens in a window (default: the context), `stride` belongs to "huggingface" (default:
    half a window), `crops` (how many) and `seed` to "nanogpt".
    """

    convention: str = "huggingface"
    window: int | None = None
    stride: int | None = None
    crops: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise SettingError(f"convention must be one of {', '.join(CONVENTIONS)}, not {self.convention!r}")
        for name, owner in (("stride", "huggingface"), ("crops", "nanogpt")):
            if getattr(self, name) is not None and self.convention != owner:
                raise SettingError(f"{name} belongs to the convention {owner}, and {self.convention} has none")
        for name in ("window", "stride", "crops"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.seed, Integral) or not 0 <= int(self.seed) < 2**32:
            raise SettingError(f"seed must be a whole number from 0 to 2^32 - 1, not {self.seed!r}")

    def resolve(self, n_ctx: int) -> "Windows":
        """Return the same with all defaults filled in. Raises `SettingError` where they do not fit the context."""
        window = n_ctx if self.window is None else self.window
        least = 2 if self.convention == "huggingface" else 1  # there the first token of a window predicts the second
        if not least <= window <= n_ctx:
            raise SettingError(f"window must be from {least} to {n_ctx}, the context of this model, not {window}")
        if self.convention == "lm-eval":
            return replace(self, window=window)
        if self.convention == "nanogpt":
            return replace(self, window=window, crops=self.crops or 1000)
        stride = self.stride or window // 2
        if stride > window:
            raise SettingError(
                f"stride must be at most the window, {window}, or tokens would be left out: not {stride}"
            )
        return replace(self, window=window, stride=stride)

    def cut(self, n: int) -> Iterator[Window]:
        """Yield the windows of `n` tokens (for "lm-eval", after the first token that it puts before them)."""
        assert self.window is not None
        if self.convention == "lm-eval":
            return rolling(n, self.window)
        if self.convention == "nanogpt":
            return cropping(n, self.window, self.crops or 0, self.seed)
        return sliding(n, self.window, self.stride or 0)


def sliding(n: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of up to `window` of `n` tokens, `stride` apart."""
    end = 0
    for begin in range(0, n, stride):
        done, end = end, min(begin + window, n)
        yield Window(begin, end, max(done, begin + 1))
        if end == n:
            return


def rolling(n: int, window: int) -> Iterator[Window]:
    """Windows that each score the next `window` of `n` tokens, but the very first; all but a single one are full."""
    for first in range(1, n, window):
        end = min(first + window, n)
        yield Window(max(end - window - 1, 0), end, first)  # one more than `window`: the last is predicted, not read


def cropping(n: int, window: int, crops: int, seed: int) -> Iterator[Window]:
    """So many windows anywhere in `n` tokens, in each of which `window` are scored."""
    # RandomState's stream is frozen for good, unlike that of default_rng.
    for begin in np.random.RandomState(seed).randint(0, n - window, size=crops).tolist():
        yield Window(begin, begin + window + 1, begin + 1)


# --- the score of a text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Score:
    """The tokens of a text [n] and their log-probabilities in nats [n], NaN for those that no window predicts.

    With "nanogpt" these are the tokens of all crops, one crop after another. `n_words` (what stands between runs of
    white space, as lm-evaluation-harness counts), `n_characters` and `n_bytes` (UTF-8) are of the whole text, and
    `n_scored_bytes` of the tokens that are scored; all four, and the figures that need them, are None for a model
    without a tokenizer. `windows` says how the text was cut.

    Figures per word, character and byte take what is not scored to be like the rest: leaving it out of the sum alone
    would make a text seem likelier than it is.
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
        """How many tokens count."""
        return int(np.isfinite(self.logprobs).sum())

    @property
    def logprob(self) -> float:
        """The log-probability of all that is scored, in nats."""
        return float(np.nansum(self.logprobs))

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy: what `lm_loss` computes, and a training reports."""
        return -self.logprob / self.n_scored

    @property
    def perplexity(self) -> float:
        """The perplexity per token: that of transformers' page."""
        return _exp(self.nats_per_token)

    @property
    def nats_per_character(self) -> float | None:
        """The loss of a character model, to compare with."""
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


def score(
    engine: Engine,
    token_ids: Sequence[int],
    windows: Windows,
    batch_size: int,
    progress: Progress | None = None,
    text: str | None = None,
) -> Score:
    """Score token ids, which `text` has been encoded to; see `Model.score`."""
    check_count("batch_size", batch_size)
    windows = windows.resolve(engine.config.n_ctx)
    ids = np.asarray(token_ids, dtype=np.int32)
    sequence = ids
    if windows.convention == "lm-eval" and ids.size:
        sequence = np.concatenate([[_prefix(engine, "the convention lm-eval")], ids]).astype(np.int32)
    _check_length(len(sequence), windows)
    cut = [window for window in windows.cut(len(sequence)) if window.first < window.end]
    total, done = sum(window.end - window.first for window in cut), 0
    found: list[Floats] = []
    for part in row_logprobs(engine, [Row(sequence[w.begin : w.end], w.first - w.begin) for w in cut], batch_size):
        found.append(part)
        done += len(part)
        if progress is not None:
            progress(done, total)
    if windows.convention == "nanogpt":
        scored, logprobs = np.concatenate([sequence[w.first : w.end] for w in cut]), np.concatenate(found)
    else:
        scored, logprobs = ids, np.full(len(sequence), np.nan)
        for window, part in zip(cut, found, strict=True):
            logprobs[window.first : window.end] = part
        logprobs = logprobs[len(sequence) - len(ids) :]
    result = Score(scored, logprobs, windows)
    return result if engine.tokenizer is None else _with_counts(result, ids, engine.tokenizer, text)


def _with_counts(score: Score, ids: Ints, tokenizer: Tokenizer, text: str | None) -> Score:
    sizes = {id: len(tokenizer.token_bytes(id)) for id in np.unique(ids).tolist()}
    if tokenizer.add_bos_token and tokenizer.bos_token_id is not None:
        sizes[tokenizer.bos_token_id] = 0  # it is no part of the text
    whole = sum(sizes[id] for id in ids.tolist())
    scored = sum(sizes[id] for id in score.token_ids[np.isfinite(score.logprobs)].tolist())
    n_bytes = whole if text is None else len(text.encode())
    text = tokenizer.decode(ids) if text is None else text
    return replace(
        score,
        n_words=len(re.split(r"\s+", text)),
        n_characters=len(text),
        n_bytes=n_bytes,
        # A tokenizer may put a space before a text, or take white space away beside an added token.
        n_scored_bytes=scored if whole == n_bytes else round(scored * n_bytes / max(whole, 1)),
    )


# --- the log-probabilities -------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Token ids, of which those after the first `n_context` (at least 1) are scored."""

    token_ids: Sequence[int] | Ints
    n_context: int


def label_logprobs(x: Array, places: Array, labels: Array, wte: Array, xp: Namespace) -> Array:
    """Log-probabilities [n], in at least float32, of `labels` [n] after the rows `places` [n] of hidden states `x`."""
    rows = xp.take(xp.reshape(x, (-1, x.shape[-1])), places, axis=0)  # [batch, n_seq, n_embd] -> [n, n_embd]
    return log_probability(at_least_float32(unembed(rows, wte, xp), xp), labels, xp)


def row_logprobs(engine: Engine, rows: Sequence[Row], batch_size: int) -> Iterator[Floats]:
    """Yield the log-probabilities of what is scored of each row, `batch_size` rows at a time.

    Raises `NumericalError` where the model computes no numbers.
    """
    reader = Reader(engine)
    # One shape for all batches, or a compiler would begin anew. What is padded comes after all that counts.
    n_batches = math.ceil(len(rows) / batch_size)
    shape = math.ceil(len(rows) / n_batches), max(len(row.token_ids) for row in rows) - 1
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
    """An engine, with what scoring compiles: the logits stay on the device, and are few at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._backend = engine, engine.backend
        self._pads = engine.backend.pad(1, 2) > 1  # a library that compiles, and wants one shape
        self._hidden_states = self._backend.compile(hidden_states, static=("config", "window", "xp"), donate=("cache",))
        self._label_logprobs = self._backend.compile(label_logprobs, static=("xp",))

    def logprobs(self, tokens: Any, labels: Ints) -> Floats:
        """Return the log-probability [batch, n_seq] of the label after each token; NaN where the label is below 0."""
        engine = self._engine
        found = np.full(labels.shape, np.nan)
        length = self._backend.piece(len(tokens))
        tokens, cache, total = engine._begin(tokens, 0, length)
        for begin in range(0, total, length):
            piece, cache, window = engine._piece(tokens, begin, cache, length)
            x, cache = self._hidden_states(
                engine.params, piece, config=engine.config, cache=cache, window=window, xp=self._backend.xp
            )
            row, place = np.nonzero(labels[:, begin : begin + length] >= 0)
            found[row, begin + place] = self._of_labels(x, row * x.shape[1] + place, labels[row, begin + place])
        if not np.isfinite(found[labels >= 0]).all():
            raise NumericalError(
                f"the model's logits are not finite in {self._backend.dtype}: its weights are damaged (NaN), "
                "or need a wider dtype"
            )
        return found

    def _of_labels(self, x: Array, places: Ints, labels: Ints) -> Floats:
        """Return the log-probabilities of `labels` [n] after the rows `places` [n] of hidden states, some at a time."""
        backend, found, n_rows = self._backend, np.empty(len(places)), x.shape[0] * x.shape[1]
        size = math.ceil(n_rows / math.ceil(n_rows * self._engine.config.n_vocab / LOGITS))
        for begin in range(0, len(places), size):
            part = slice(begin, begin + size)
            missing = size - len(places[part]) if self._pads else 0
            logprobs = self._label_logprobs(
                x,
                *(backend.asarray(np.pad(ids[part], (0, missing)).astype(np.int32)) for ids in (places, labels)),
                wte=self._engine.params["wte"],
                xp=backend.xp,
            )
            found[part] = backend.to_numpy(logprobs)[: len(places[part])]
        return found


# --- choices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RankedChoice:
    """A continuation: which of those given it is, its tokens [n], and their log-probabilities in nats [n]."""

    index: int
    choice: str | list[int]
    token_ids: list[int]
    logprobs: Floats

    @property
    def logprob(self) -> float:
        """The log-probability of the choice: `acc` of lm-evaluation-harness goes by this."""
        return float(self.logprobs.sum())

    @property
    def logprob_per_token(self) -> float:
        """The mean over its tokens: long choices are not at a disadvantage."""
        return self.logprob / len(self.token_ids)

    @property
    def logprob_per_byte(self) -> float | None:
        """The same over its UTF-8 bytes, without the space before it; None for token ids.

        `acc_norm` of lm-evaluation-harness goes by this (it counts characters: the same in ASCII).
        """
        if not isinstance(self.choice, str):
            return None
        return self.logprob / max(len(self.choice.removeprefix(" ").encode()), 1)


def rank(
    engine: Engine,
    prompt: str | list[int],
    choices: Sequence[str | list[int]],
    by: str,
    batch_size: int,
    encode: Callable[[str], list[int]],
) -> list[RankedChoice]:
    """Rank continuations; see `Model.rank`."""
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
    wholes, n_context = _encode_choices(engine, prompt, choices, encode)
    longest = max(map(len, wholes))
    if longest > engine.config.n_ctx + 1:  # the last is predicted, and not read
        raise PromptError(
            f"the prompt and its longest choice have {longest} tokens, and this model takes {engine.config.n_ctx} and "
            f"predicts one more: shorten the prompt by {longest - engine.config.n_ctx - 1}"
        )
    found = row_logprobs(engine, [Row(ids, n_context) for ids in wholes], batch_size)
    ranked = [
        RankedChoice(index, choice, ids[n_context:], logprobs)
        for index, (choice, ids, logprobs) in enumerate(zip(choices, wholes, found, strict=True))
    ]
    return sorted(ranked, key=measures[by], reverse=True)


def _encode_choices(
    engine: Engine, prompt: str | list[int], choices: Sequence[Any], encode: Callable[[str], list[int]]
) -> tuple[list[list[int]], int]:
    """Return the token ids of the prompt with each choice, and how many of them, the same in all, are not scored.

    Prompt and choice are encoded together, and white space at the end of the prompt counts as the choice's, as in
    lm-evaluation-harness's `_encode_pair`: " yes" is one token, where " " and "yes" are two. Where a choice changes the
    last tokens of the prompt (it continues a word), those tokens are scored with every choice.
    """
    if not choices or not all(len(choice) for choice in choices):
        raise PromptError("there must be at least one choice, and none may be empty")
    if isinstance(prompt, str):
        context = encode(prompt.rstrip())
        wholes = [encode(prompt + choice) for choice in choices]
    else:
        context, wholes = prompt, [[*prompt, *choice] for choice in choices]
    n_context = min(_shared(context, ids) for ids in wholes)
    if n_context:
        return wholes, n_context
    eos = _prefix(engine, "a choice without a prompt before it")
    return [[eos, *ids] for ids in wholes], 1


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements at the start are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# --- checks ----------------------------------------------------------------------------------------------------------


def _prefix(engine: Engine, what: str) -> int:
    if engine.first_token is None:
        raise SettingError(f"{what} is predicted from the token that begins a text (bos_token_id): this model has none")
    return engine.first_token


def _check_length(n: int, windows: Windows) -> None:
    """Raise `PromptError` where there is no token to score."""
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


def check_count(name: str, value: object) -> None:
    """Raise `SettingError` unless this is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, not {value!r}")


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
