"""Speculation: the guesses, when it pays, and that the text is that of plain decoding on every backend.

Two kinds of guesses are tested: those of the text's own repeats, and those of a prophet, who knows what plain decoding
gives and errs at places that the test chooses. With the prophet, every way to accept and to refuse comes up.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

from gpt_xp import Backend, Generation, GPT2Config, Model
from gpt_xp.cli.report import add_stats, stats_line
from gpt_xp.generation import decoder, speculation
from gpt_xp.generation.speculation import CREDIT, LONGEST_NGRAM, PASS_TOKENS, SHORTEST_NGRAM, Account, NGrams
from gpt_xp.tolerances import TOLERANCE

FILTERS = {"temperature": 0.8, "top_k": 23, "top_p": 0.9, "min_p": 0.01, "seed": 5}
OPTIONS = {
    "greedy": {},
    "greedy, penalty": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 0.9, "seed": 2},
    "filters": FILTERS,
    "filters, penalty": FILTERS | {"repetition_penalty": 1.2},
}


# Proposals.


def looked_up(text: list[int], count: int) -> list[int] | None:
    """Propose by searching the whole text, as a proposal is defined."""
    for n in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
        for begin in range(len(text) - n - 1, -1, -1):
            if len(text) > n and text[begin : begin + n] == text[-n:]:
                longer = list(text)
                for place in range(begin + n, begin + n + count):
                    longer.append(longer[place])
                return longer[len(text) :]
    return None


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
@example([], 3)
@example([1], 3)
@example([1, 1], 3)
@example([1, 1, 1], 3)
def test_proposals_are_what_followed_the_longest_match_last(text: list[int], count: int) -> None:
    assert NGrams(text).propose(count) == looked_up(text, count)


def test_proposals_of_a_known_text() -> None:
    assert NGrams([5, 6, 7, 8, 9, 5, 6]).propose(4) == [7, 8, 9, 5]
    assert NGrams([1, 2, 9, 1, 2, 8, 1, 2]).propose(2) == [8, 1]  # the last match counts
    assert NGrams([3, 1, 2, 9, 4, 1, 2, 8, 3, 1, 2]).propose(2) == [9, 4]  # a longer match counts more
    assert NGrams([4, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]  # a loop goes on
    assert NGrams([1, 2, 3, 4, 4]).propose(2) is None


def test_all_rows_that_go_on_must_have_a_proposal() -> None:
    guesses = speculation.Speculation([[1, 2, 3, 1], [4, 5, 6, 7]])
    guesses.append(np.array([2, 8]), [True, True])
    assert guesses.propose([True, False]) is None  # A plain step must be measured first.
    guesses.account.add_step(1.0)
    proposed = guesses.propose([True, False])
    assert proposed is not None
    assert proposed.shape == (2, PASS_TOKENS - 1)
    assert proposed[0].tolist() == [3, 1, 2, 3, 1, 2, 3][: PASS_TOKENS - 1]
    assert guesses.propose([True, True]) is None


# The account. The costs are given, so nothing is timed.


def decode(accepted: Callable[[int], int], price: float, n_tokens: int = 2000) -> tuple[float, int]:
    """Decode with steps of one second and passes of `price` seconds; return all seconds and the number of passes.

    `accepted` returns how many proposed tokens are right at a place in the text.
    """
    account, place, seconds, passes = Account(), 0, 0.0, 0
    while place < n_tokens:
        tokens = 1 + accepted(place)
        if account.is_open:
            account.add_pass(tokens, price)
            seconds, passes = seconds + price, passes + 1
        else:
            for _ in range(tokens):
                account.add_step(1.0)
            account.add_watched(tokens)
            seconds += tokens
        place += tokens
    return seconds, passes


def test_a_step_is_measured_before_anything_is_proposed() -> None:
    account = Account()
    assert not account.is_open
    account.add_step(1.0)
    assert account.is_open


def test_it_goes_on_where_it_pays() -> None:
    seconds, passes = decode(lambda place: PASS_TOKENS - 1, price=2.5, n_tokens=80 * PASS_TOKENS)
    assert passes == 79  # The first step is a plain one.
    assert seconds == PASS_TOKENS + 2.5 * 79


@pytest.mark.parametrize("price", [1.5, 2.5, 7.0, 100.0])
def test_it_stops_where_it_loses(price: float) -> None:
    seconds, passes = decode(lambda place: 0, price)
    assert 1 <= passes <= 1 + CREDIT / (price - 1)
    assert seconds == 2000 + passes * (price - 1)


def test_a_text_that_repeats_opens_it_again_at_once() -> None:
    seconds, _ = decode(lambda place: 0 if place < 1000 else PASS_TOKENS - 1, price=2.5)
    assert seconds <= 1000 + CREDIT + 2.5 + PASS_TOKENS + 2.5 * 1000 / PASS_TOKENS


def test_an_old_gain_pays_for_no_long_loss() -> None:
    seconds, _ = decode(lambda place: PASS_TOKENS - 1 if place < 1000 else 0, price=2.5)
    assert seconds <= PASS_TOKENS + 2.5 * 1000 / PASS_TOKENS + 1000 + CREDIT + 2.5


@given(st.floats(0, 1), st.floats(0.5, 9), st.integers(0, 2**32))
def test_it_loses_little_and_gains_most_of_what_there_is(chance: float, price: float, seed: int) -> None:
    """Each proposed token is right with probability `chance` if those before it are right."""
    draw = random.Random(seed)

    def accepted(place: int) -> int:
        return next((n for n in range(PASS_TOKENS - 1) if draw.random() >= chance), PASS_TOKENS - 1)

    seconds, _ = decode(accepted, price, n_tokens=1000)
    always = 1000 * price / sum(chance**n for n in range(PASS_TOKENS))  # the seconds if every proposal were used
    assert seconds <= 1.25 * min(1000, always) + 2 * price + PASS_TOKENS


def test_a_price_of_a_bad_moment_does_not_stand() -> None:
    account = Account()
    account.add_step(1.0)
    account.add_pass(PASS_TOKENS, 1000.0)
    assert not account.is_open
    watched = 0
    while not account.is_open:
        account.add_watched(PASS_TOKENS)
        watched += 1
    assert watched < 10


def test_proposals_are_watched_while_it_is_off() -> None:
    guesses = speculation.Speculation([[1, 2, 3, 4]])
    guesses.account.add_step(1.0)
    guesses.account.add_pass(1, 4.0)
    said, appended = itertools.cycle([1, 2, 3, 4]), 0
    while guesses.propose([True]) is None:
        guesses.append(np.array([next(said)]), [True])
        appended += 1
    # The first proposal comes after the second "1 2". All its tokens are right, and one more.
    assert appended == 2 + PASS_TOKENS


def test_one_slow_step_decides_nothing() -> None:
    account = Account()
    for seconds in (1.0, 1.0, 1.0, 100.0, 1.0):
        account.add_step(seconds)
    account.add_pass(1, 1 + CREDIT)
    assert not account.is_open


# The text is the same as that of plain decoding.


class Prophet:
    """Proposes the tokens that follow, with wrong tokens at some places."""

    rows: Iterator[tuple[list[int], set[int]]]  # for each row: its next tokens, and the places of wrong tokens

    def __init__(self, prompt: Iterable[int]) -> None:
        (self.future, self.errs), self.place = next(self.rows), 0

    def append(self, token: int) -> None:
        self.place += 1

    def propose(self, count: int) -> list[int]:
        places = range(self.place, self.place + count)
        known = [self.future[place] if place < len(self.future) else 0 for place in places]
        return [token ^ 1 if place in self.errs else token for place, token in zip(places, known, strict=True)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speculate even if it does not save time."""
    monkeypatch.setattr(Account, "is_open", True)
    monkeypatch.setattr(Account, "add_pass", lambda *_: None)


@pytest.fixture
def prophesy(monkeypatch: pytest.MonkeyPatch, always: None) -> Callable[..., None]:
    """Propose these continuations. The wrong tokens of each row come one token later than in the row before."""

    def prophesy(*plain: Generation, errs: Iterable[int] = ()) -> None:
        rows = [(out.token_ids, {place + row for place in errs}) for row, out in enumerate(plain)]
        monkeypatch.setattr(Prophet, "rows", iter(rows), raising=False)
        monkeypatch.setattr(speculation, "NGrams", Prophet)

    return prophesy


def small(backend: Backend, name: str = "prime", **changes: Any) -> Model:
    return Model(small_params(name), replace(CONFIGS[name], **changes), backend=backend)


def error_of(model: Model) -> float:
    """Return the allowed difference of two computations of the same logit."""
    tokens = small_tokens(next(name for name, config in CONFIGS.items() if config.n_vocab == model.config.n_vocab))
    return float(TOLERANCE["same", "float32"] * np.abs(model.logits(tokens)).max())


def assert_same(actual: list[Generation], expected: list[Generation], model: Model) -> None:
    """Check for equal tokens, log-probabilities and ends, up to the first tie of the row."""
    error = error_of(model)
    for ours, theirs in zip(actual, expected, strict=True):
        pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
        differ = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        assert differ is None or theirs.margins[differ] < 2 * error, "more than a tie"
        same = slice(differ)
        np.testing.assert_allclose(ours.logprobs[same], theirs.logprobs[same], rtol=0, atol=2 * error)
        if differ is None:
            assert ours.finish_reason == theirs.finish_reason
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            np.testing.assert_allclose(ours.margins, theirs.margins, rtol=0, atol=4 * error)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_text_is_that_of_plain_decoding(
    backend: Backend, options: dict[str, Any], prophesy: Callable[..., None]
) -> None:
    model, tokens = small(backend), small_tokens("prime")[0].tolist()
    # One row; and a batch in which rows end one after the other, the longest at the end of the ring.
    for prompts in ([tokens[:7]], [tokens[:3], tokens[:11], tokens[:5]]):
        plain = model.generate(prompts, max_tokens=27, **options)
        prophesy(*plain, errs={3, 4, 12, 22})
        ours = model.generate(prompts, max_tokens=27, speculate=True, **options)
        assert_same(ours, plain, model)
        assert 0 < ours[0].stats.accepted_tokens < ours[0].stats.proposed_tokens


def test_a_text_that_repeats(backend: Backend, always: None) -> None:
    model = small(backend)
    prompt = small_tokens("prime")[0, :3].tolist() * 2
    plain = model.generate(prompt, max_tokens=None)  # to the end of the context
    ours = model.generate(prompt, max_tokens=None, speculate=True)
    assert_same([ours], [plain], model)
    assert ours.finish_reason == "context"
    assert ours.stats.accepted_tokens > 0


def test_rows_that_run_through_the_ring(backend: Backend, prophesy: Callable[..., None]) -> None:
    model, tokens = small(backend), small_tokens("prime")[0].tolist()
    prompts = [tokens[:2], tokens[:23], tokens[:7]]
    plain = model.generate(prompts, max_tokens=None)
    assert len(prompts[1]) + len(plain[0].token_ids) > 37  # slots of the ring
    prophesy(*plain, errs=range(0, 40, 3))
    assert_same(model.generate(prompts, max_tokens=None, speculate=True), plain, model)


def test_samples_of_one_prompt(prophesy: Callable[..., None]) -> None:
    model, tokens = small(make_backend("numpy")), small_tokens("prime")[0, :5].tolist()
    plain = model.generate(tokens, num_samples=3, max_tokens=29, **FILTERS)
    prophesy(*plain, errs={9, 20})
    ours = model.generate(tokens, num_samples=3, max_tokens=29, speculate=True, **FILTERS)
    assert_same(ours, plain, model)
    assert ours[0].stats.accepted_tokens >= 3 * 20


@pytest.mark.parametrize("errs", [(), (0,), range(0, 30, 2), range(30)], ids=["never", "first", "often", "always"])
def test_wrong_guesses_cost_time_and_no_more(errs: Iterable[int], prophesy: Callable[..., None]) -> None:
    model, tokens = small(make_backend("numpy")), small_tokens("prime")[0, :5].tolist()
    plain = model.generate(tokens, max_tokens=30)
    prophesy(plain, errs=errs)
    ours = model.generate(tokens, max_tokens=30, speculate=True)
    assert_same([ours], [plain], model)
    stats = ours.stats
    assert stats.generated_tokens == 30
    if errs == range(30):
        assert stats.accepted_tokens == 0
    if errs == ():
        # Each pass gives PASS_TOKENS tokens, of which the last was not proposed. Prefill gave the first token.
        passes, rest = divmod(30 - 1, PASS_TOKENS)
        assert stats.proposed_tokens == (passes + 1) * (PASS_TOKENS - 1)
        assert stats.accepted_tokens == passes * (PASS_TOKENS - 1) + rest


class Agreeable(np.ndarray):
    """Token ids that are equal to every other id."""

    def __eq__(self, other: object) -> Any:
        return np.ones(self.shape, dtype=bool)

    __hash__ = None  # type: ignore[assignment]


def test_accepting_everything_would_be_caught(prophesy: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small(make_backend("numpy")), small_tokens("prime")[0, :5].tolist()
    plain = model.generate(tokens, max_tokens=30)
    propose = speculation.Speculation.propose
    monkeypatch.setattr(speculation.Speculation, "propose", lambda *args: propose(*args).view(Agreeable))
    for errs in ((), (4,)):
        prophesy(plain, errs=errs)
        ours = model.generate(tokens, max_tokens=30, speculate=True)
        if errs:
            with pytest.raises(AssertionError):
                assert_same([ours], [plain], model)
        else:
            assert_same([ours], [plain], model)


def test_the_end_token_in_the_middle_of_what_is_accepted(prophesy: Callable[..., None]) -> None:
    numpy, tokens = make_backend("numpy"), small_tokens("prime")[0, :5].tolist()
    free = small(numpy).generate(tokens, max_tokens=30, **FILTERS)
    for place in range(1, 12):
        if free.token_ids.index(free.token_ids[place]) < place:
            continue
        model = small(numpy, eos_token_id=free.token_ids[place])
        prophesy(free)
        ours = model.generate(tokens, max_tokens=30, speculate=True, **FILTERS)
        assert (ours.token_ids, ours.finish_reason) == (free.token_ids[:place], "eos")
        prophesy(free)
        on = model.generate(tokens, max_tokens=30, speculate=True, ignore_eos=True, **FILTERS)
        assert on.token_ids == free.token_ids


@pytest.mark.parametrize("max_tokens", range(1, 2 * PASS_TOKENS + 3))
def test_max_tokens_in_the_middle_of_what_is_accepted(max_tokens: int, prophesy: Callable[..., None]) -> None:
    model, tokens = small(make_backend("numpy")), small_tokens("prime")[0, :5].tolist()
    plain = model.generate(tokens, max_tokens=30)
    prophesy(plain)
    ours = model.generate(tokens, max_tokens=max_tokens, speculate=True)
    assert (ours.token_ids, ours.finish_reason) == (plain.token_ids[:max_tokens], "max_tokens")


@pytest.mark.parametrize("stop", ["\n", "o", [" the", "e "], "no such text"])
def test_pieces_and_stop_strings(shakespeare: Model, prophesy: Callable[..., None], stop: Any) -> None:
    settings = {"max_tokens": 40, "temperature": 0.7, "seed": 3, "stop": stop}
    plain = list(shakespeare.stream("ROMEO:", **settings))
    prophesy(shakespeare.generate("ROMEO:", **settings | {"stop": None}), errs={5, 18})
    ours = list(shakespeare.stream("ROMEO:", speculate=True, **settings))
    assert [(piece.text, piece.token_id, piece.index) for piece in ours] == [
        (piece.text, piece.token_id, piece.index) for piece in plain
    ]
    assert (ours[-1].result.text, ours[-1].result.finish_reason) == (
        plain[-1].result.text,
        plain[-1].result.finish_reason,
    )


def test_texts_of_random_errors(prophesy: Callable[..., None]) -> None:
    model, tokens = small(make_backend("numpy"), "long"), small_tokens("long")[0, :131].tolist()
    options = {"max_tokens": None, "temperature": 1.0, "seed": 9, "repetition_penalty": 1.1}
    plain = model.generate(tokens, **options)
    draw = random.Random(1)
    prophesy(plain, errs=[place for place in range(200) if draw.random() < 0.15])
    assert_same([model.generate(tokens, speculate=True, **options)], [plain], model)


# Turning itself off, in a generation.


@pytest.mark.parametrize(("cost", "most"), [(1e6, 3), (1e-6, 10**6)])
def test_the_price_decides_on_speed_alone(cost: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_pass = Account.add_pass
    monkeypatch.setattr(Account, "add_pass", lambda self, tokens, _: add_pass(self, tokens, cost))
    monkeypatch.setattr(Account, "add_step", lambda self, _, add_step=Account.add_step: add_step(self, 1.0))
    model = small(make_backend("numpy"), "long")
    prompt = [1, 2, 3] * 3
    plain = model.generate(prompt, max_tokens=100)
    ours = model.generate(prompt, max_tokens=100, speculate=True)
    assert_same([ours], [plain], model)
    passes = ours.stats.proposed_tokens // (PASS_TOKENS - 1)
    assert 1 <= passes <= most
    if cost < 1:
        assert passes > 5


# Compiled programs, and statistics.


def test_jax_compiles_one_more_program(monkeypatch: pytest.MonkeyPatch, always: None) -> None:
    backend = make_backend("jax")
    traced: list[str] = []

    def spy_on(name: str) -> None:
        original = getattr(decoder, name)

        def spy(params: Any, tokens: Any, cache: Any, *count: Any, config: GPT2Config, xp: Any) -> tuple[Any, Any]:
            traced.append(f"{name} {tokens.shape} {cache.n_slots}")
            return original(params, tokens, cache, *count, config=config, xp=xp)

        monkeypatch.setattr(decoder, name, spy)

    spy_on("next_token_logits")
    spy_on("candidate_logits")
    model = small(backend, "long")
    prompt = [1, 2, 3, 1, 2]
    for speculate in (False, True, True, False):
        model.generate(prompt, max_tokens=100, speculate=speculate)
    plain = ["next_token_logits (1, 16) 128", "next_token_logits (1, 1) 128"]
    assert traced == [*plain, f"candidate_logits (1, {PASS_TOKENS}) 128"]
    assert model.generate(prompt, max_tokens=100, speculate=True).stats.compile_seconds == 0


def test_statistics(always: None) -> None:
    model = small(make_backend("numpy"), "long")
    plain = model.generate([1, 2, 3] * 3, max_tokens=50).stats
    stats = model.generate([1, 2, 3] * 3, max_tokens=50, speculate=True).stats
    assert (plain.proposed_tokens, plain.accepted_tokens) == (0, 0)
    assert 0 < stats.accepted_tokens <= stats.proposed_tokens
    counted = replace(stats, proposed_tokens=64, accepted_tokens=31)
    assert "; speculation accepted 31 of 64 proposed tokens" in stats_line("small", counted)
    assert "speculation" not in stats_line("small", plain)
    both = add_stats([counted, replace(counted, proposed_tokens=7, accepted_tokens=5)])
    assert (both.proposed_tokens, both.accepted_tokens) == (71, 36)


def test_the_option(call: Any, shakespeare: Model, always: None) -> None:
    prompt = "\n".join(["To be, or not to be"] * 4)
    plain, ours = call(prompt, "--json"), call(prompt, "--json", GPT_XP_SPECULATE="1")
    assert json.loads(ours.out)["text"] == json.loads(plain.out)["text"]
    assert json.loads(ours.out)["settings"]["speculate"] is True
    assert json.loads(ours.out)["batch"]["accepted_tokens"] > 0
    assert json.loads(plain.out)["batch"]["proposed_tokens"] == 0
    assert "speculation accepted" in call(prompt, "--speculate", "--stats").err
