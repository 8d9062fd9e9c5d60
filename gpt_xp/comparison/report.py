"""Write a comparison as text: tables for a terminal of 80 columns, or Markdown."""

from collections.abc import Callable, Sequence

from gpt_xp.comparison.figures import Flip
from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.reporting.text import markdown_table, short_dtypes, size, table, wrapped

Table = Sequence[Sequence[str]]


def as_text(comparison: Comparison, layers: bool = False) -> str:
    """Return the report for a terminal; with `layers`, also the error after each layer."""
    return _report(comparison, table, layers)


def as_markdown(comparison: Comparison, layers: bool = False) -> str:
    """Return the report with tables in Markdown; with `layers`, also the error after each layer."""
    return _report(comparison, markdown_table, layers)


def _report(comparison: Comparison, layout: Callable[[Table], str], layers: bool) -> str:
    n_params, n_prompts = comparison.config.n_params, len(comparison.prompts)
    parts = [
        f"{comparison.model}, {n_params / 1e6:.1f}M params; "
        f"{sum(comparison.prompt_tokens)} tokens in {n_prompts} prompt(s),\n"
        f"{comparison.max_tokens} generated from each; compared with float64 on NumPy {comparison.reference.version}\n",
        *(layout(rows) for rows in _tables(comparison, layers) if len(rows) > 1),
        _flips(comparison),
        "".join(wrapped(f"{_name(run)} on {run.device}: {_settings(run)}") for run in comparison.runs if run.figures),
        verdict(comparison),
    ]
    return "\n".join(part for part in parts if part)


def verdict(comparison: Comparison) -> str:
    """Return a line for each backend and dtype: inside the tolerance, what is outside, or why it was skipped."""
    lines = []
    for run in comparison.runs:
        if run.skipped:
            lines.append(f"{_name(run)}: skipped, {run.skipped}")
        elif run.is_ok:
            lines.append(f"{_name(run)}: inside the tolerance")
        else:
            lines += [f"{_name(run)}: {'OUTSIDE' if run.figures else 'FAILED'}: {problem}" for problem in run.problems]
    return "".join(map(wrapped, lines))


def _tables(comparison: Comparison, layers: bool) -> list[Table]:
    each = [_layers(run) for run in comparison.runs if layers and run.figures]
    return [_logits(comparison), *each, _tokens(comparison), _speed(comparison)]


def _logits(comparison: Comparison) -> Table:
    rows: list[tuple[str, ...]] = [("logits", "max diff", "mean diff", "KL mean", "KL max", "top-1", "begins at")]
    for run in comparison.runs:
        if run.figures:
            logits, layer = run.figures.logits, run.figures.first_out_of_line
            rows.append((
                _short(run), f"{logits.difference.max:.1e}", f"{logits.difference.mean:.1e}", f"{logits.kl_mean:.0e}",
                f"{logits.kl_max:.0e}", f"{logits.top1_agreement:.2%}", layer.name if layer else "-",
            ))  # fmt: skip
    return rows


def _layers(run: BackendResult) -> Table:
    assert run.figures is not None
    rows: list[tuple[str, ...]] = [(_short(run), "max diff", "mean diff", "of the largest", "allowed")]
    for layer in run.figures.layers:
        found = layer.difference
        figures = (found.max, found.mean, found.relative, layer.allowed)
        rows.append((layer.name, *(f"{figure:.1e}" for figure in figures)))
    return rows


def _tokens(comparison: Comparison) -> Table:
    rows: list[tuple[str, ...]] = [("tokens", "greedy", "differ", "shared", "sampled", "differ", "shared")]
    for run in comparison.runs:
        if run.figures and run.figures.tokens:
            cells = [_short(run)]
            for mode in ("greedy", "sampled"):
                found = run.figures.tokens[mode]
                cells += [str(found.n_tokens), str(len(found.flips)), f"{min(found.shared)}/{found.length}"]
            rows.append(tuple(cells))
    return rows


def _speed(comparison: Comparison) -> Table:
    rows: list[tuple[str, ...]] = [("tokens per second", "prefill", "decode", "first token", "compiling", "memory")]
    for run in (comparison.reference, *comparison.runs):
        if run.speed:
            speed, peak = run.speed, run.peak_memory_bytes
            rows.append((
                _short(run), _rate(speed["prefill_tokens_per_second"]), _rate(speed["decode_tokens_per_second"]),
                f"{speed['time_to_first_token']:.3f} s", f"{speed['compile_seconds']:.2f} s",
                "-" if peak is None else size(peak),
            ))  # fmt: skip
    return rows


def _flips(comparison: Comparison) -> str:
    """Return the first few tokens that differ, with the margin that tells a tie from an error."""
    lines = []
    for run in comparison.runs:
        if run.figures:
            for what, flips in run.figures.flips().items():
                lines += [wrapped(f"{_name(run)}, {what}: {_flip(flip)}").rstrip() for flip in flips[:5]]
                lines += [f"{_name(run)}, {what}: and {len(flips) - 5} more"] if len(flips) > 5 else []
    return "".join(line + "\n" for line in lines)


def _flip(flip: Flip) -> str:
    return (
        f"prompt {flip.prompt}, position {flip.position}: token {flip.token}, not {flip.expected}, "
        f"which was ahead by {flip.margin:.1e}"
    )


def _settings(run: BackendResult) -> str:
    return ", ".join(f"{key} {value}" for key, value in {"version": run.version, **run.settings}.items())


def _name(run: BackendResult) -> str:
    return f"{run.backend} {run.dtype}"


def _short(run: BackendResult) -> str:
    return f"{run.backend} {short_dtypes(run.dtype)}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f}"
