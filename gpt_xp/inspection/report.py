"""Write a look as tables for a terminal: of its last tokens, and of what the model finds after the last one."""

from collections.abc import Iterator, Sequence

import numpy as np

from gpt_xp.comparison.distances import Distance
from gpt_xp.comparison.figures import layer_names
from gpt_xp.inspection.results import Look
from gpt_xp.reporting.text import short_dtypes, spelled, table, wrapped

LAST_TOKENS = 24
NEXT_TOKENS = 10
KEYS = 2  # tokens that a layer looks at most

Table = Sequence[Sequence[str]]


def as_text(look: Look) -> str:
    """Return the tables: the tokens, the next token, the logit lens, attention and the distances of backends."""
    n_seq, last = len(look.token_ids), _token(look, look.token_ids[-1])
    parts = [f"{look.model}, {look.made_by['backend']}: {n_seq} token(s)\n", *_tokens(look)]
    parts += [f"next token after {last}\n", table(_next_tokens(look))]
    parts += [f"logit lens after {last}: the likeliest tokens, were this layer the last\n", table(_lens(look))]
    parts += [f"attention of {last}: the mean of the heads, and the head with the largest weight\n"]
    parts += [table(_attention(look)), *_distances(look)]
    return "\n".join(parts)


def _tokens(look: Look) -> Iterator[str]:
    first = max(0, len(look.token_ids) - LAST_TOKENS)
    if first:
        yield f"the last {LAST_TOKENS} tokens\n"
    rows = [("position", "token", "id", "surprise, nats")]
    for position, token in enumerate(look.token_ids[first:], first):
        nats = look.surprise[position]
        rows.append((str(position), _token(look, token), str(token), "-" if np.isnan(nats) else f"{nats:.3f}"))
    yield table(rows)


def _next_tokens(look: Look) -> Table:
    found = look.predictions
    powers = np.exp(found.all_logits.astype(np.float64) - found.all_logits.max())
    probabilities = powers / powers.sum()
    rows: list[tuple[str, ...]] = [("token", "id", "logit", "probability")]
    for token in found.ids[found.position][:NEXT_TOKENS]:
        rows.append((
            _token(look, token), str(token), f"{found.all_logits[token]:.3f}", f"{probabilities[token]:.2%}",
        ))  # fmt: skip
    return rows


def _lens(look: Look) -> Table:
    final = _token(look, look.lens.ids[-1, -1, 0])
    rows: list[tuple[str, ...]] = [("layer", "first", "second", "third", final)]
    for name, ids, logprobs, chosen in zip(
        layer_names(look.config.n_layer), look.lens.ids[:, -1], look.lens.logprobs[:, -1], look.lens.final[:, -1],
        strict=False,
    ):  # fmt: skip
        best = [f"{_token(look, token)} {np.exp(p):.0%}" for token, p in zip(ids[:3], logprobs[:3], strict=True)]
        rows.append((name, *best, *[""] * (3 - len(best)), f"{np.exp(chosen):.1%}"))
    return rows


def _attention(look: Look) -> Table:
    rows: list[tuple[str, ...]] = [("layer", "the mean looks at", "", "head", "looks at")]
    last = look.attention.last / (1 if look.attention.last.dtype == np.float32 else 65535)
    for layer, heads in enumerate(last):
        mean = heads.mean(axis=0)
        keys = mean.argsort(kind="stable")[::-1][:KEYS]
        head, key = np.unravel_index(heads.argmax(), heads.shape)
        places = [_place(look, int(each), mean[each]) for each in keys]
        strongest = _place(look, int(key), heads[head, key])
        rows.append((f"block {layer}", *places, *[""] * (KEYS - len(places)), str(head), strongest))
    return rows


def _place(look: Look, position: int, weight: float) -> str:
    return f"{position} {_token(look, look.token_ids[position])} {weight:.0%}"


def _distances(look: Look) -> Iterator[str]:
    if not look.distances:
        yield "--backends numpy,jax shows how far these are from float64, layer by layer\n"
        return
    yield "largest error from float64 on NumPy, divided by the layer's largest number\n"
    ran = [each for each in look.distances if each.relative is not None]
    rows: list[tuple[str, ...]] = [("layer", *(_name(each) for each in ran))]
    for depth, name in enumerate([*layer_names(look.config.n_layer), "logits"]):
        rows.append((name, *(_error(each, depth) for each in ran)))
    if ran:
        yield table(rows)
    yield "".join(map(wrapped, verdicts(look)))


def _error(distance: Distance, depth: int) -> str:
    assert distance.relative is not None
    assert distance.allowed is not None
    error, allowed = distance.relative[depth].max(), distance.allowed[depth]
    return f"{error:.1e}" + ("" if error <= allowed else f" (allowed: {allowed:.1e})")


def verdicts(look: Look) -> Iterator[str]:
    """Yield a sentence for each backend: whether it is inside the tolerance."""
    for each in look.distances:
        if each.relative is None:
            yield f"{_name(each)}: FAILED: {'; '.join(each.problems)}"
        elif each.problems:
            yield f"{_name(each)}: OUTSIDE: {'; '.join(each.problems)}"
        else:
            assert each.is_same is not None
            n_same, n_seq = int(each.is_same.sum()), len(look.token_ids)
            yield f"{_name(each)}: inside the tolerance; the same likeliest token at {n_same} of {n_seq} positions"


def _name(distance: Distance) -> str:
    return f"{distance.backend} {short_dtypes(distance.dtype)}"


def _token(look: Look, token: int) -> str:
    known = look.vocabulary.get(int(token))
    return f"#{token}" if known is None else spelled(known)
