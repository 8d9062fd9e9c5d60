"""Show a continuation: its JSON fields, the line of statistics, the table of tokens."""

import dataclasses
import importlib.util
import math
import platform
from collections.abc import Sequence
from typing import Any

from gpt_xp.cli.session import Session
from gpt_xp.generation.results import Generation, Stats
from gpt_xp.quantization import quantization_of
from gpt_xp.reporting.text import table
from gpt_xp.version import __version__

SESSION_STATS = ("backend", "device", "dtype", "quantize")  # fields of `Stats` that are equal in all batches


def shared_fields(session: Session, result: Generation) -> dict[str, Any]:
    """Return the JSON fields that a continuation shares with others: the session's, and `batch`, the statistics."""
    return {**session_fields(session), "batch": stats_fields(result.stats)}


def session_fields(session: Session) -> dict[str, Any]:
    """Return the JSON fields that all continuations of a session share."""
    backend = session.model.backend
    return {
        "seed": session.settings.seed,
        "settings": {name: value for name, value in dataclasses.asdict(session.settings).items() if name != "seed"},
        "model": session.name,
        "backend": backend.name,
        "device": backend.device,
        "dtype": backend.dtype,
        "quantize": quantization_of(session.model.params),
        "versions": {
            "gpt_xp": __version__,
            "python": platform.python_version(),
            backend.name: backend.version,
        },
    }


def stats_fields(stats: Stats) -> dict[str, Any]:
    """Return the JSON fields of a batch: the statistics over all its rows."""
    own = {name: value for name, value in dataclasses.asdict(stats).items() if name not in SESSION_STATS}
    return {
        **own,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
    }


def stats_line(name: str, stats: Stats, packing: str | None = None) -> str:
    """Return the line that --stats prints. `packing` is how long a backend has packed the weights."""
    parts = [
        ", ".join(filter(None, (f"{name} on {stats.backend}", stats.device, stats.dtype, stats.quantize))),
        f"prompt {_tokens(stats.prompt_tokens, stats.prefill_tokens_per_second)}",
        f"generated {_tokens(stats.generated_tokens, stats.decode_tokens_per_second)}",
        f"first token after {stats.time_to_first_token:.3f} s",
    ]
    if stats.proposed_tokens:
        parts.append(f"speculation accepted {stats.accepted_tokens} of {stats.proposed_tokens} proposed tokens")
    if stats.compile_seconds:
        parts.append(f"compiling {stats.compile_seconds:.2f} s")
    if packing:
        parts.append(f"packing {packing}")
    if stats.peak_memory_bytes is not None:
        parts.append(f"peak memory {stats.peak_memory_bytes / 1e6:.0f} MB")
    if stats.backend == "numpy" and stats.dtype == "float32" and importlib.util.find_spec("llvmlite"):
        parts.append("faster here: --backend native")
    return "; ".join(parts)


def add_stats(each: Sequence[Stats]) -> Stats:
    """Return the statistics of several batches as one."""

    def total(field: str) -> Any:
        return sum(getattr(stats, field) for stats in each)

    sums = (
        "rows", "prompt_tokens", "generated_tokens", "proposed_tokens", "accepted_tokens",
        "compile_seconds", "prefill_seconds", "decode_seconds",
    )  # fmt: skip
    return dataclasses.replace(
        each[0],
        **{field: total(field) for field in sums},
        peak_memory_bytes=each[-1].peak_memory_bytes,  # The peak never falls.
    )


def logprob_table(session: Session, result: Generation) -> str:
    """Return each token with its log probability and its probability."""
    tokenizer = session.model.tokenizer
    assert tokenizer is not None  # `load` always reads a tokenizer.
    rows = [("id", "token", "logprob", "probability")]
    for token, logprob in zip(result.token_ids, result.logprobs, strict=True):
        rows.append((str(token), tokenizer.decoder[token], f"{logprob:.4f}", f"{math.exp(logprob):.4f}"))
    return table(rows)


def _tokens(count: int, rate: float | None) -> str:
    return f"{count} tokens" + ("" if rate is None else f" at {rate:.1f} tok/s")
