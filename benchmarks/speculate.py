"""Compare decoding with and without `--speculate`, in turns, on the same prompts.

    pip install -e '.[dev]'
    python benchmarks/speculate.py --threads 2                      # the bundled model, on text of several kinds
    python benchmarks/speculate.py --threads 2 --model 124M         # the published model, on the same text
    python benchmarks/speculate.py --threads 2 --random 124M        # a model of its shape with random weights
    python benchmarks/speculate.py --threads 2 --random 124M --widths

Random weights write nonsense, but take as long as trained ones. Their greedy text falls into a loop, which is the best
case. In the rows "N% right", N% of the proposed tokens are those that plain decoding chooses, and the others are wrong.
`--widths` times one pass over 1 to 16 tokens. The gain depends on it: if a pass of 8 takes twice as long as a pass of
1, it must give more than two tokens.

Before timing, the tokens of both ways are compared. The first difference is reported with its margin. In each round,
the two take turns. The seconds are those of decoding, after the first token, without compiling.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

PASSAGE = """Before we proceed any further, hear me speak. You are all resolved rather to die than to famish? First, \
you know Caius Marcius is chief enemy to the people. Let us kill him, and we'll have corn at our own price."""
CODE = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def sub(self, other):
        return Point(self.x - other.x, self.y - other.y)

    def mul"""


class Case(NamedTuple):
    """A prompt and its settings. `right` is the share of right proposals, or None for gpt-xp's own proposals."""

    name: str
    prompt: Any
    settings: dict[str, Any]
    right: float | None = None


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or a directory (default: the bundled model)")
    parser.add_argument("--random", choices=["124M", "355M"], help="random weights of this shape instead")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="only the cases whose name contains this")
    parser.add_argument("--widths", action="store_true", help="time passes over 1 to 16 tokens instead")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    os.environ |= dict.fromkeys(
        ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(options.threads)
    )
    import gpt_xp

    if options.random:
        from shapes import random_params

        config = gpt_xp.SIZES[options.random]
        model = gpt_xp.Model(random_params(config), config, backend=options.backend)
        cases = random_cases(config)
    else:
        model = gpt_xp.load(options.model or "shakespeare", backend=options.backend)
        cases = text_cases()
    name = f"{options.random} shape, random weights" if options.random else options.model or "shakespeare"
    if not options.json:
        print(f"{name}; {options.backend} {model.backend.version}, {options.threads} threads; {platform.machine()}")
    if options.widths:
        figures = pass_times(model, options.rounds)
    else:
        figures = [compare(model, case, options) for case in cases if (options.only or "") in case.name]
    if options.json:
        print(json.dumps({"options": vars(options), "figures": figures}, indent=1))


def text_cases() -> list[Case]:
    """Return prompts of text, for which gpt-xp makes its own proposals."""
    fresh = {"temperature": 1.0, "seed": 1}
    lines = "".join(f"FIRST CITIZEN:\nWe know't, we know't.\n\n{who}:\nSpeak, speak.\n\n" for who in ("ALL", "SECOND"))
    return [
        Case("repetitive", lines * 2, {}),
        Case("greedy", "ROMEO:", {}),
        Case("code", CODE, {}),
        Case("summary", f"{PASSAGE}\n\nTL;DR: Before we", {}),
        Case("quoting, sampled", f"{PASSAGE}\n\nAgain: Before we proceed", fresh | {"temperature": 0.5}),
        Case("fresh, sampled", "ROMEO:", fresh),
    ]


def random_cases(config: Any) -> list[Case]:
    """Return random prompts, with a given share of right proposals."""
    draw = random.Random(1)
    prompt = [draw.randrange(config.n_vocab) for _ in range(400)]
    forced = [Case(f"{right:.0%} right", prompt, {}, right) for right in (1.0, 0.9, 0.8, 0.6, 0.3, 0.0)]
    return [
        Case("greedy, a loop", prompt, {}),
        *forced,
        Case("fresh, sampled", prompt, {"temperature": 1.0, "seed": 1}),
        # The prompt repeats itself, but the text that follows does not. So most proposals are wrong.
        Case("false repeats", prompt[:40] * 10, {"temperature": 2.0, "top_k": 1000, "seed": 1}),
    ]


def compare(model: Any, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Decode one case both ways in turns. Print the figures and return them."""
    settings = {"max_tokens": options.tokens, "ignore_eos": True} | case.settings

    def plainly() -> Any:
        return model.generate(case.prompt, **settings)

    plain = plainly()

    def speculating() -> Any:
        with guesses(plain.token_ids, case.right):
            return model.generate(case.prompt, speculate=True, **settings)

    differ = first_difference(plain, speculating())
    speculating()  # The run before compiled programs. This one has them.
    runs: dict[Callable[[], Any], list[float]] = {plainly: [], speculating: []}
    stats = []
    for _ in range(options.rounds):
        for run, per_token in runs.items():
            out = run()
            per_token.append(1e3 * out.stats.decode_seconds / (out.stats.generated_tokens - 1))
            if run is speculating:
                stats.append(out.stats)
    plain_ms, ms = (statistics.median(times) for times in runs.values())
    ratios = sorted(a / b for a, b in zip(*runs.values(), strict=True))
    row = {
        "case": case.name,
        "plain_ms_per_token": round(plain_ms, 2),
        "speculate_ms_per_token": round(ms, 2),
        "times_as_fast": round(statistics.median(ratios), 2),
        "least_and_most": [round(ratios[0], 2), round(ratios[-1], 2)],
        "proposed": round(statistics.median(each.proposed_tokens for each in stats)),
        "accepted": round(statistics.median(each.accepted_tokens for each in stats)),
        "first_difference": differ,
    }
    if not options.json:
        low, high = row["least_and_most"]
        print(f"{case.name:18} plain {plain_ms:6.2f} ms a token, speculating {ms:6.2f}: {row['times_as_fast']:5.2f} x "
              f"as fast ({low:.2f} to {high:.2f}); accepted {row['accepted']} of {row['proposed']}"
              + (f"; tokens differ from {differ}" if differ else ""))  # fmt: skip
    return row


def first_difference(plain: Any, ours: Any) -> str | None:
    """Return where the tokens differ first, and the margin of plain decoding there, or None."""
    for step, (a, b) in enumerate(zip(plain.token_ids, ours.token_ids, strict=True)):
        if a != b:
            return f"token {step} on, where the margin was {plain.margins[step]:.1e}"
    return None


@contextmanager
def guesses(future: list[int], right: float | None) -> Iterator[None]:
    """Propose tokens of which the share `right` is `future`. None leaves the proposals as they are."""
    from gpt_xp.generation import speculation

    original = speculation.NGrams
    wrong = {place for place, x in enumerate(random.Random(2).choices([False, True], [right or 0, 1 - (right or 0)],
                                                                      k=len(future))) if x}  # fmt: skip

    class Known:
        def __init__(self, prompt: Any) -> None:
            self.place = 0

        def append(self, token: int) -> None:
            self.place += 1

        def propose(self, count: int) -> list[int]:
            tokens = [*future, *[0] * count][self.place : self.place + count]
            return [token ^ 1 if self.place + i in wrong else token for i, token in enumerate(tokens)]

    if right is not None:
        speculation.NGrams = Known  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        speculation.NGrams = original  # type: ignore[misc]


def pass_times(model: Any, rounds: int, context: int = 512) -> list[dict[str, Any]]:
    """Time passes over 1 to 16 tokens in turns, with `context` tokens in the cache. Print medians and return them."""
    import numpy as np

    decoder, backend = model._decoder, model.backend
    _, cache = decoder.prefill([[1] * context])
    times: dict[int, list[float]] = {n: [] for n in (1, 2, 3, 4, 6, 8, 12, 16)}
    for turn in range(rounds + 1):
        for n, ms in times.items():
            for step in range(4):
                tokens = np.full((1, n), 7, dtype=np.int32)
                begin = time.perf_counter()
                each, cache = decoder.candidate_logits(tokens, cache._replace(position=context))
                backend.to_numpy(each[-1])
                # The first turn compiles. Before the first step of a turn, the processor's caches hold other data.
                if turn and step:
                    ms.append(1e3 * (time.perf_counter() - begin))
    one = statistics.median(times[1])
    for n, ms in times.items():
        print(f"{n:2} tokens: {statistics.median(ms):6.1f} ms, {statistics.median(ms) / one:.2f} x a pass of 1")
    return [{"tokens": n, "median_ms": round(statistics.median(ms), 2)} for n, ms in times.items()]


if __name__ == "__main__":
    main()
