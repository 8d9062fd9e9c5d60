"""`Model.look`: gather everything that the page shows about one prompt."""

import contextlib
import operator
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt_xp.arrays import at_least_float32
from gpt_xp.comparison.distances import Distance, distances
from gpt_xp.comparison.driver import check_backends
from gpt_xp.errors import SettingError
from gpt_xp.generation.choosing import not_finite
from gpt_xp.inspection.attention import attention_of, without_weights
from gpt_xp.inspection.page import EMPTY_SIZE, page
from gpt_xp.inspection.results import BINS, LENS_TOP, MAX_SIZE, TOP, Attention, Lens, Look, Predictions
from gpt_xp.model import Model
from gpt_xp.processes import StageProgress, no_stage_progress
from gpt_xp.prompts import Text
from gpt_xp.transformer import layer_norm, unembed
from gpt_xp.types import Array, Namespace, NumpyArray, Params
from gpt_xp.version import __version__

BYTES_OF_A_CHARACTER = 3 / 4  # Numbers are written in base64.
# A layer of the lens costs as much as the logits of its positions. All layers have about so many logits together, or
# more, where these are not enough for LENS_POSITIONS.
LENS_LOGITS, LENS_POSITIONS = 40_000_000, 64


def look(
    model: Model,
    prompt: Text,
    backends: str | Sequence[str] | None = None,
    *,
    position: int | None = None,
    max_size: int | None = None,
    special_tokens: bool = False,
    name: str | None = None,
    source: Path | None = None,
    threads: int | None = None,
    progress: StageProgress = no_stage_progress,
    for_page: bool = True,
) -> Look:
    """Return what happens inside the model for one prompt; see `Model.look`.

    `name` is what the page calls the model. `source` is the directory that it was loaded from, if its params are
    unchanged. Without it, the model is saved to a temporary directory for the processes that compare backends.
    `threads` and `progress` are as for `compare`. With `for_page` False, attention is only that of the last token.
    """
    ids = model._encode(prompt, special_tokens)
    chosen = _place(position, len(ids))
    if backends:
        check_backends(backends, [model.backend.dtype])
    limit = MAX_SIZE if max_size is None else max_size
    if for_page and limit < EMPTY_SIZE:  # What is certain is told before anything is computed.
        raise _too_small(limit, len(ids), EMPTY_SIZE)
    with progress("the model"):
        streams = model.trace(ids, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post", "logits"])
        logits = streams.pop("logits")
        if not np.isfinite(logits).all():
            raise not_finite(model.backend)
        predicted = predictions(logits, chosen)
        lens = logit_lens(model, list(streams.values()), logits)
    found = Look(
        model=name or f"a GPT-2 of {model.config.n_params / 1e6:.1f}M params",
        config=model.config,
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=tuple(map(int, ids)),
        vocabulary=spellings(model, {*ids, *predicted.ids.flat, *lens.ids.flat}),
        surprise=surprise(logits, ids),
        predictions=predicted,
        lens=lens,
        attention=without_weights(model.config, len(ids)),
        distances=compared(model, ids, backends, source, threads, progress) if backends else (),
        made_by=made_by(model),
    )
    space = room(found, limit) if for_page else 0
    with progress("attention"):
        attention = attention_of(model, ids, space)
    return replace(found, attention=attention, left_out=tuple(left_out(attention, lens, len(ids))))


def _place(position: int | None, n_seq: int) -> int:
    """Return the position of a token, counted from 0. Raises `SettingError` where there is none."""
    try:
        chosen = n_seq - 1 if position is None else operator.index(position)
    except TypeError:
        chosen = n_seq
    if not -n_seq <= chosen < n_seq:
        raise SettingError(f"position must be the number of one of the {n_seq} tokens, from 0, not {position!r:.40}")
    return chosen % n_seq


def room(found: Look, max_size: int) -> int:
    """Return the bytes of a page that are left for the weights of attention, before they are written as text.

    Raises `SettingError` if there are too few for any picture of them.
    """
    rest = replace(found, left_out=tuple(left_out(found.attention, found.lens, len(found.token_ids))))
    last = found.attention.last.nbytes  # They are zeros yet, which take no room.
    size = len(page(rest).encode()) + int(last / BYTES_OF_A_CHARACTER)
    left = int((max_size - size) * BYTES_OF_A_CHARACTER)
    if left < (least := found.config.n_layer * found.config.n_head):
        raise _too_small(max_size, len(found.token_ids), size + int(least / BYTES_OF_A_CHARACTER) + 1)
    return left


def _too_small(max_size: int, n_seq: int, least: int) -> SettingError:
    tokens = "1 token" if n_seq == 1 else f"{n_seq} tokens"
    return SettingError(f"max_size is {max_size}, and a page for {tokens} takes at least {least} bytes")


# --- predictions ------------------------------------------------------------------------------------------------------


def surprise(logits: NumpyArray, ids: Sequence[int]) -> NumpyArray:
    """Return -log p of each token in nats [n_seq], NaN for the first."""
    found = np.full(len(ids), np.nan)
    for row, token in enumerate(ids[1:]):
        found[row + 1] = log_sum_exp(logits[row]) - float(logits[row, token])
    return found


def log_sum_exp(logits: NumpyArray) -> float:
    """Return log(sum(exp(logits))) of a row, in float64."""
    largest = float(logits.max())
    return largest + float(np.log(np.exp(logits.astype(np.float64) - largest).sum()))


def predictions(logits: NumpyArray, position: int) -> Predictions:
    """Return the `Predictions` of logits [n_seq, n_vocab]."""
    ids = largest_first(logits, TOP)
    counts = np.zeros((len(logits), BINS), np.int32)
    levels = np.zeros((len(logits), BINS), np.float32)
    for row, (scores, best) in enumerate(zip(logits, ids, strict=True)):
        rest = np.delete(scores.astype(np.float64), best)
        if rest.size:
            counts[row], levels[row] = histogram(rest)
    return Predictions(
        ids.astype(np.int32), np.take_along_axis(logits, ids, axis=1).astype(np.float32), counts, levels,
        position, logits[position].astype(np.float32),
    )  # fmt: skip


def largest_first(logits: NumpyArray, count: int) -> NumpyArray:
    """Return the indices of the `count` largest of each row, the largest first; of equal ones the lower index first."""
    found = []
    for row in logits:
        bound = np.partition(row, -count)[-count] if count < len(row) else -np.inf
        some = np.flatnonzero(row >= bound)  # A few more, where several are equal. To sort all would take long.
        found.append(some[np.argsort(-row[some], kind="stable")[:count]])
    return np.stack(found)


def histogram(rest: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Return the counts of equally wide bins, and for each the level that gives the bin's exact sum of exponentials."""
    low, high = rest.min(), rest.max()
    bins = np.minimum((rest - low) / max(high - low, 1e-30) * BINS, BINS - 1).astype(int)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, np.exp(rest - high), minlength=BINS)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.where(counts > 0, high + np.log(sums / counts), 0)
    return counts, levels


# --- the logit lens ---------------------------------------------------------------------------------------------------


def lens_logits(params: Params, x: Array, xp: Namespace) -> Array:
    """Read the residual stream [rows, n_embd] as if it were the last: return logits [rows, n_vocab]."""
    return at_least_float32(unembed(layer_norm(x, **params["ln_f"], xp=xp), params["wte"], xp), xp)


def logit_lens(model: Model, streams: list[NumpyArray], logits: NumpyArray) -> Lens:
    """Return the `Lens` of the residual streams [n_seq, n_embd] at the last positions. `logits` are the model's own."""
    config, backend = model.config, model.backend
    first = max(0, len(logits) - max(LENS_POSITIONS, LENS_LOGITS // ((config.n_layer + 1) * config.n_vocab)))
    step = backend.compile(lens_logits, static=("xp",))
    final = logits[first:].argmax(axis=-1)[:, None]
    ids, logprobs, chosen = [], [], []
    for depth, x in enumerate(streams):
        if depth < len(streams) - 1:
            scores = backend.to_numpy(step(model.params, backend.asarray(x[first:], backend.dtype), xp=backend.xp))
        else:  # After the last block, the lens is the model itself.
            scores = logits[first:]
        total = np.array([log_sum_exp(row) for row in scores])[:, None]
        best = largest_first(scores, LENS_TOP)
        ids.append(best)
        logprobs.append(np.take_along_axis(scores, best, axis=1) - total)
        chosen.append((np.take_along_axis(scores, final, axis=1) - total)[:, 0])
    return Lens(first, np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(chosen, np.float32))


# --- the rest ---------------------------------------------------------------------------------------------------------


def spellings(model: Model, ids: set[int]) -> dict[int, bytes]:
    """Return the bytes of the tokens with these ids; of those without a token, nothing."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {}
    return {
        int(token): tokenizer.decode_bytes([int(token)]) for token in sorted(ids) if int(token) in tokenizer.decoder
    }


def compared(
    model: Model,
    ids: list[int],
    backends: str | Sequence[str],
    source: Path | None,
    threads: int | None,
    progress: StageProgress,
) -> tuple[Distance, ...]:
    """Return the distance of each backend from float64."""
    with contextlib.ExitStack() as stack:
        if source is None:
            source = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt-xp-look-")))
            model.save(source)
        dtype = model.backend.dtype
        return distances(source, ids, backends, dtype=dtype, threads=threads, progress=progress)


def left_out(attention: Attention, lens: Lens, n_seq: int) -> Iterator[str]:
    """Yield a sentence for each of the numbers that are not exact or not there."""
    if attention.kind == "uint8":
        yield "The weights of attention are rounded to 8 bits (the error is at most 0.004), but for the last token."
    elif attention.kind == "small":
        yield (
            f"The weights of attention are small pictures: each number is the largest of {attention.square} x "
            f"{attention.square} weights. Those of the last token are complete."
        )
    if attention.last.dtype != np.float32:
        yield "The weights of the last token are rounded to 16 bits."
    if lens.first:
        yield f"The logit lens has the last {n_seq - lens.first} of {n_seq} positions."


def made_by(model: Model) -> dict[str, str]:
    """Return the versions and settings behind the numbers, by name."""
    backend = model.backend
    return {
        "gpt-xp": __version__,
        "backend": f"{backend.name} {backend.version} on {backend.device}, {backend.dtype}",
        **backend.settings(),
    }
