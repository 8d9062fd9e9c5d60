"""Write a benchmark as text: tables for a terminal, or Markdown."""

from collections.abc import Callable, Iterator, Sequence

from gpt_xp.benchmark.figures import Phase, Spread, Workload
from gpt_xp.benchmark.results import Benchmark, ContenderResult
from gpt_xp.reporting.text import markdown_table, short_dtypes, size, table, wrapped

Table = Sequence[Sequence[str]]


def as_text(benchmark: Benchmark) -> str:
    """Return the report for a terminal."""
    return _report(benchmark, table)


def as_markdown(benchmark: Benchmark) -> str:
    """Return the report with tables in Markdown."""
    return _report(benchmark, markdown_table)


def _report(benchmark: Benchmark, layout: Callable[[Table], str]) -> str:
    tables = (_phases(benchmark, "prefill"), _phases(benchmark, "decode"), _contenders(benchmark))
    parts = [_head(benchmark), *(layout(rows) for rows in tables if len(rows) > 1), _settings(benchmark)]
    return "\n".join(part for part in [*parts, verdict(benchmark)] if part)


def verdict(benchmark: Benchmark) -> str:
    """Return a line for each contender without figures, which says why."""
    lines = [f"{each.name}: skipped, {each.skipped}" for each in benchmark.standings if each.skipped]
    lines += [f"{each.name}: FAILED: {each.failed}" for each in benchmark.standings if each.failed]
    return "".join(map(wrapped, lines))


def _head(benchmark: Benchmark) -> str:
    known = benchmark.environment
    memory = f", {size(known['memory_bytes'])}" if known["memory_bytes"] else ""
    run = f"{benchmark.title}, {benchmark.rounds} rounds, threads {benchmark.threads}; {known['date']}"
    machine = (
        f"{known['cpu']}, {known['cores']} cores{memory}; {known['system']}, Python {known['python']}, "
        f"gpt-xp {known['gpt_xp']}"
    )
    if benchmark.reference is None:  # Nothing was measured.
        return "".join(map(wrapped, (run, machine)))
    meaning = (
        "Medians ± half of the distance between the quartiles. Ratios are taken within one round and shown with their "
        f"quartiles: to {benchmark.reference}, and to the matrix products alone (floor)."
    )
    return "".join(map(wrapped, (run, machine, meaning)))


def _phases(benchmark: Benchmark, what: str) -> Table:
    """Return the rows of prefill or decode, one for each workload and contender."""
    first = short_dtypes(str(benchmark.reference))
    rows: list[tuple[str, ...]] = [(what, "tokens", "ms", "tokens/s", f"x {first}", "x floor")]
    for index, workload in enumerate(benchmark.workloads):
        for result, phase in _measured(benchmark, index, what):
            is_first = result.name == benchmark.reference
            rows.append((
                short_dtypes(result.name), _shape(workload), _milliseconds(phase.seconds),
                number(phase.tokens_per_second), "-" if is_first else ratio(phase.ratio),
                "-" if result.is_floor else ratio(phase.floor_ratio),
            ))  # fmt: skip
    return rows


def _measured(benchmark: Benchmark, index: int, what: str) -> Iterator[tuple[ContenderResult, Phase]]:
    for result in benchmark.standings:
        phase = getattr(result.figures[index], what) if result.figures else None
        if phase is not None:
            yield result, phase


def _contenders(benchmark: Benchmark) -> Table:
    rows: list[tuple[str, ...]] = [("", "device", "version", "logits differ by", "compiling", "memory", "cores")]
    for each in benchmark.standings:
        if each.figures:
            compiling, peak = each.compile_seconds, each.peak_memory_bytes
            rows.append((
                short_dtypes(each.name), each.description["device"], each.description["version"],
                "-" if each.logits_difference is None else f"{each.logits_difference:.1e}",
                "-" if not compiling else f"{compiling:.2f} s", "-" if peak is None else size(peak),
                "-" if each.cores is None else number(each.cores),
            ))  # fmt: skip
    return rows


def _settings(benchmark: Benchmark) -> str:
    lines = [
        wrapped(f"{each.name}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
        for each in benchmark.standings
        if each.figures and (settings := each.description.get("settings"))
    ]
    return "".join(lines)


def number(value: float) -> str:
    """Return a number with three digits, or with all digits before the point."""
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def ratio(found: Spread | None) -> str:
    """Return a ratio and its quartiles: "1.02 0.98-1.05"."""
    return "-" if found is None else f"{number(found.median)} {number(found.low)}-{number(found.high)}"


def _milliseconds(seconds: Spread) -> str:
    return f"{number(1e3 * seconds.median)} ±{(seconds.high - seconds.low) / 2 / seconds.median:.0%}"


def _shape(workload: Workload) -> str:
    return str(workload.context) if workload.batch == 1 else f"{workload.batch} x {workload.context}"
