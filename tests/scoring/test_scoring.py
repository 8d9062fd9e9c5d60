"""Scoring, on every backend: against a forward pass of its own for each token, by a GPT-2 written once more."""

import functools
import math
import re
from dataclasses import replace
from typing import Any

import naive_gpt2
import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params

import gpt_xp
from gpt_xp import Backend, Model, Score
from gpt_xp.errors import NumericalError, PromptError, SettingError
from gpt_xp.scoring import score as scoring
from gpt_xp.scoring.rank import RankedChoice
from gpt_xp.scoring.windows import Windows, rolling, sliding

CONFIG = replace(CONFIGS["prime"], eos_token_id=5)  # n_ctx 37
EOS = 5
TEXT = np.random.RandomState(7).randint(0, CONFIG.n_vocab, size=61).tolist()
CONVENTIONS: list[dict[str, Any]] = [
    {},
    {"window": 19, "stride": 7},
    {"stride": 37},
    {"convention": "lm-eval"},
    {"convention": "lm-eval", "window": 11},
    {"convention": "nanogpt", "window": 13, "crops": 3, "seed": 3},
]


def small(backend: Backend | str = "numpy") -> Model:
    return Model(small_params("prime"), CONFIG, backend=backend)


@functools.cache
def naive_logprob(context: tuple[int, ...], token: int) -> float:
    logits = naive_gpt2.gpt2(context, **small_params("prime"), n_head=CONFIG.n_head)[-1]
    return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def contexts(n: int, convention: str = "huggingface", window: int = 37, stride: int | None = None) -> list[range]:
    """For each of n tokens, the places of those it is predicted from; -1 is the end-of-text token."""
    found = []
    for place in range(n):
        if convention == "lm-eval":
            begin = place // window * window - 1
            if n - place <= n % window and n > window:  # in the last window, which is as long as the others
                begin = n - 1 - window
        else:
            stride = stride or window // 2
            begin = max(0, math.ceil((place + 1 - window) / stride)) * stride  # of the first window that reaches it
        found.append(range(begin, place))
    return found


def expected_logprobs(ids: list[int], **settings: Any) -> np.ndarray:
    logprobs = []
    for token, places in zip(ids, contexts(len(ids), **settings), strict=True):
        context = tuple(EOS if place == -1 else ids[place] for place in places)
        logprobs.append(naive_logprob(context, token) if context else math.nan)
    return np.array(logprobs)


def assert_logprobs(actual: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> None:
    assert actual.dtype == np.float64
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    assert_values(actual[~np.isnan(actual)], expected[~np.isnan(expected)], TOLERANCE["logits", dtype])


# Each token


@pytest.mark.parametrize("settings", CONVENTIONS[:-1], ids=str)
def test_logprobs_are_those_of_a_forward_pass_for_each_token(backend: Backend, settings: dict[str, Any]) -> None:
    score = small(backend).score(TEXT, **settings, batch_size=2)
    expected = expected_logprobs(TEXT, **settings)
    assert score.token_ids.tolist() == TEXT
    assert_logprobs(score.logprobs, expected)
    assert score.n_scored == np.isfinite(expected).sum()
    assert score.nats_per_token == pytest.approx(-np.nanmean(expected), rel=TOLERANCE["logits", "float32"])
    assert score.perplexity == pytest.approx(math.exp(-np.nanmean(expected)), rel=1e-4)
    assert score.word_perplexity is None  # without a tokenizer there are no words


def test_random_crops(backend: Backend) -> None:
    settings = CONVENTIONS[-1]
    score = small(backend).score(TEXT, **settings)
    assert score.n_scored == len(score.logprobs) == len(score.token_ids) == 3 * 13
    starts = set()
    for crop, logprobs in zip(score.token_ids.reshape(3, 13), score.logprobs.reshape(3, 13), strict=True):
        start = next(i for i in range(48) if TEXT[i + 1 : i + 14] == crop.tolist())
        starts.add(start)
        ids = TEXT[start : start + 14]
        expected = [naive_logprob(tuple(ids[:i]), ids[i]) for i in range(1, 14)]
        assert_logprobs(logprobs, np.array(expected))
    assert len(starts) == 3
    other = small().score(TEXT, **settings | {"seed": 4})
    assert other.token_ids.tolist() != score.token_ids.tolist()


@pytest.mark.parametrize("settings", CONVENTIONS[:-1], ids=str)
def test_float64(settings: dict[str, Any]) -> None:
    score = small(make_backend("numpy", "float64")).score(TEXT, **settings)
    assert_logprobs(score.logprobs, expected_logprobs(TEXT, **settings), "float64")


def test_a_text_within_one_window_has_the_loss_that_training_sees(backend: Backend) -> None:
    ids = TEXT[:31]
    model = small(backend)
    loss = gpt_xp.lm_loss(small_params("prime"), np.array(ids), CONFIG)
    for stride in (1, 18, 37):
        assert model.score(ids, stride=stride).nats_per_token == pytest.approx(loss, rel=TOLERANCE["logits", "float32"])


def test_the_first_token_of_each_crop_has_one_token_of_context_and_all_start_in_the_text() -> None:
    drawn = {window.begin for window in Windows("nanogpt", 3, crops=200).resolve(5).cut(7)}
    assert drawn == {0, 1, 2, 3}


def test_one_program_for_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last window and the last batch are padded: JAX traces a function again for another shape."""
    traced = []
    plain = scoring.label_logprobs

    def noted(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(scoring, "label_logprobs", noted)
    score = small(make_backend("jax")).score(TEXT, window=19, stride=7, batch_size=4)
    assert_logprobs(score.logprobs, expected_logprobs(TEXT, window=19, stride=7))
    assert len(traced) == 1


def test_logits_are_few_at_a_time_and_only_of_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    plain = scoring.unembed

    def noted(*args: Any) -> Any:
        logits = plain(*args)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(scoring, "unembed", noted)
    monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", 7 * CONFIG.n_vocab)
    score = small().score(TEXT, window=19, stride=7)
    assert_logprobs(score.logprobs, expected_logprobs(TEXT, window=19, stride=7))
    assert {n_vocab for _, n_vocab in shapes} == {CONFIG.n_vocab}
    assert max(rows for rows, _ in shapes) <= 7
    assert sum(rows for rows, _ in shapes) == 60


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_no_figure_depends_on_the_batch(data: st.DataObject) -> None:
    ids = TEXT[: data.draw(st.integers(2, 61), "length")]
    chosen: dict[str, Any] = {"window": data.draw(st.integers(2, 37), "window")}
    if data.draw(st.booleans(), "lm-eval"):
        chosen["convention"] = "lm-eval"
    else:
        chosen["stride"] = data.draw(st.integers(1, chosen["window"]), "stride")
    one, several = (
        small().score(ids, **chosen, batch_size=size) for size in (1, data.draw(st.integers(2, 9), "batch"))
    )
    assert_values(np.nan_to_num(several.logprobs), np.nan_to_num(one.logprobs), TOLERANCE["same", "float32"])


def test_progress_is_told_of_every_token() -> None:
    told: list[tuple[int, int]] = []
    small().score(TEXT, window=19, stride=7, progress=lambda done, total: told.append((done, total)))
    assert told == [(min(19 + 7 * i, 61) - 1, 60) for i in range(7)]


# Windows


@given(st.integers(1, 200), st.integers(2, 50), st.data())
def test_a_sliding_window_scores_each_token_once_with_as_much_context_as_promised(
    n: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, end, first in sliding(n, window, stride):
        assert begin % stride == 0
        assert begin < end <= min(begin + window, n)
        assert first > begin
        assert first - begin >= window - stride or begin == 0  # what a later window at least looks back on
        scored += range(first, end)
    unscored = set(range(0, n, window)) if stride == window else {0}
    assert scored == [place for place in range(n) if place not in unscored]


@given(st.integers(1, 200), st.integers(1, 50))
def test_rolling_windows_score_each_token_once_and_are_full(n: int, window: int) -> None:
    scored = []
    for begin, end, first in rolling(n + 1, window):
        assert end - begin == min(window, n) + 1
        scored += range(first, end)
    assert scored == list(range(1, n + 1))


def test_rolling_windows_are_those_of_the_harness() -> None:
    """The example that its `loglikelihood_rolling` gives for ten tokens and a context of 4."""
    sequence = ["end", *range(10)]
    pairs = [(sequence[begin : end - 1], sequence[first:end]) for begin, end, first in rolling(11, 4)]
    assert pairs == [(["end", 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]


# Figures


def test_figures_of_a_text(shakespeare: Model) -> None:
    text = "Ü, the  moon\nand\tstars \n"
    for convention in ("lm-eval", "huggingface"):
        score = shakespeare.score(text, convention=convention)
        assert (score.n_words, score.n_characters, score.n_bytes) == (6, 24, 25)  # the empty one at the end counts too
        nats = -np.nansum(score.logprobs)
        assert score.nats_per_token == pytest.approx(nats / (len(score.logprobs) - (convention != "lm-eval")))
        if convention == "lm-eval":  # every token is scored
            assert score.n_scored_bytes == 25
        else:
            first = len(shakespeare.tokenizer.token_bytes(int(score.token_ids[0])))
            assert score.n_scored_bytes == 25 - first
            nats *= 25 / (25 - first)  # as if the first were like the rest
        assert score.word_perplexity == pytest.approx(math.exp(nats / len(re.split(r"\s+", text))))
        assert score.byte_perplexity == pytest.approx(math.exp(nats / 25))
        assert score.bits_per_byte == pytest.approx(nats / 25 / math.log(2))
        assert score.nats_per_character == pytest.approx(nats / 24)


def test_text_and_its_token_ids_have_one_score(shakespeare: Model) -> None:
    text = "Now is the winter of our discontent"
    by_text, by_ids = shakespeare.score(text), shakespeare.score(shakespeare.tokenizer.encode(text))
    np.testing.assert_array_equal(by_text.logprobs, by_ids.logprobs)
    assert by_ids.word_perplexity == by_text.word_perplexity
    assert gpt_xp.Score is type(by_text)


def test_crops_of_a_text_count_its_bytes(shakespeare: Model) -> None:
    score = shakespeare.score("My lord, my lord, my lord", convention="nanogpt", window=2, crops=5)
    sizes = [len(shakespeare.tokenizer.token_bytes(id)) for id in score.token_ids.tolist()]
    assert len(sizes) == 10
    assert score.nats_per_character == pytest.approx(-score.logprobs.sum() / sum(sizes))


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    score = Score(np.arange(2), np.array([math.nan, -1000.0]), Windows(), 1, 9, 9, 9)
    assert score.perplexity == score.word_perplexity == math.inf


# Choices


def test_choices_are_ranked_by_what_a_forward_pass_for_each_token_says(backend: Backend) -> None:
    prompt, choices = TEXT[:7], [[11, 3], [89], [2, 17, 41, 8], [3, 3]]
    model = small(backend)
    for by, measure in (("total", np.sum), ("token", np.mean)):
        ranked = model.rank(prompt, choices, by=by, batch_size=3)
        expected = []
        for each in ranked:
            ids = choices[each.index]
            assert each.choice == each.token_ids == ids
            logprobs = [naive_logprob((*prompt, *ids[:i]), token) for i, token in enumerate(ids)]
            assert_logprobs(each.logprobs, np.array(logprobs))
            expected.append(measure(logprobs))
        assert expected == sorted(expected, reverse=True)
        assert sorted(each.index for each in ranked) == [0, 1, 2, 3]
    assert isinstance(ranked[0], RankedChoice)


def test_without_a_prompt_choices_follow_the_end_of_text(backend: Backend) -> None:
    for each in small(backend).rank([], [[11, 3], [89]]):
        logprobs = [naive_logprob((EOS, *each.token_ids[:i]), token) for i, token in enumerate(each.token_ids)]
        assert_logprobs(each.logprobs, np.array(logprobs))


def test_measures_of_a_choice() -> None:
    each = RankedChoice(0, " né", [1, 2], np.array([-1.0, -3.0]))
    assert (each.logprob, each.logprob_per_token) == (-4.0, -2.0)
    assert each.logprob_per_byte == pytest.approx(-4 / 3)  # without the space, as the harness counts
    assert RankedChoice(0, " ", [1], np.array([-1.0])).logprob_per_byte == -1.0


def test_measures_can_disagree(shakespeare: Model) -> None:
    prompt, choices = "ROMEO:\nO ", ["my most dear lord and most gracious father", "qx", "z"]
    orders = {}
    for by in ("total", "token", "byte"):
        ranked = shakespeare.rank(prompt, choices, by=by)
        orders[by] = [each.index for each in ranked]
        value = {"total": "logprob", "token": "logprob_per_token", "byte": "logprob_per_byte"}[by]
        values = [getattr(each, value) for each in ranked]
        assert values == sorted(values, reverse=True)
    assert orders["total"] != orders["byte"]


def test_a_space_belongs_to_the_choice_wherever_it_is_written(shakespeare: Model) -> None:
    inside = shakespeare.rank("My name is ", ["Romeo", "Tybalt"])
    before = shakespeare.rank("My name is", [" Romeo", " Tybalt"])
    for a, b in zip(inside, before, strict=True):
        assert a.token_ids == b.token_ids
        assert a.token_ids == shakespeare.tokenizer.encode(f" {a.choice}")
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.logprob_per_byte == b.logprob_per_byte
    newline = shakespeare.tokenizer.encode("\n")
    assert shakespeare.rank("My lord,\n", ["Romeo"])[0].token_ids[:1] == newline  # white space of any kind


@settings(deadline=None, max_examples=25)
@given(
    st.text("aeht \n", min_size=1, max_size=8),
    st.lists(st.text("aeht ,", min_size=1, max_size=5), min_size=2, max_size=3),
)
def test_choices_differ_by_what_the_whole_texts_do(shakespeare: Model, start: str, choices: list[str]) -> None:
    """However the tokens fall where prompt and choice meet: what is not scored is the same in all."""
    prompt = f"My lord,\n{start}"
    for each in shakespeare.rank(prompt, choices):
        first = shakespeare.rank(prompt, choices)[0]
        whole, whole_first = (shakespeare.score(prompt + choice).logprob for choice in (each.choice, first.choice))
        assert each.logprob - first.logprob == pytest.approx(whole - whole_first, abs=1e-4)


# What cannot be scored


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([], {}, "the text is empty"),
        ([], {"convention": "lm-eval"}, "the text is empty"),
        ([3], {}, "one token, and nothing before it predicts it: the convention lm-eval"),
        (TEXT, {"convention": "nanogpt", "window": 37, "crops": 1, "seed": 2**32 - 1}, None),
        (TEXT[:37], {"convention": "nanogpt"}, "the text has 37 tokens, and a crop takes 38"),
        ([3, 101], {}, "token id 101 is not in the model's vocabulary"),
        ([3, -1], {}, "token id -1 is not in the model's vocabulary"),
        ([3, 1.5], {}, "token ids"),
        ("text", {}, "no tokenizer"),
        (TEXT, {"stride": 0}, "stride must be a whole number of at least 1, not 0"),
        (TEXT, {"stride": 1.5}, "stride must be a whole number of at least 1, not 1.5"),
        (TEXT, {"window": 19, "stride": 20}, "stride must be at most the window, 19, .*: not 20"),
        (TEXT, {"window": 38}, "window must be from 2 to 37, .*, not 38"),
        (TEXT, {"window": 1}, "window must be from 2 to 37, .*, not 1"),
        (TEXT, {"window": 38, "convention": "lm-eval"}, "window must be from 1 to 37"),
        (TEXT, {"window": True}, "window must be a whole number"),
        (TEXT, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (TEXT, {"convention": "other"}, "convention must be one of huggingface, lm-eval, nanogpt, not 'other'"),
        (TEXT, {"convention": "lm-eval", "stride": 3}, "stride belongs to the convention huggingface"),
        (TEXT, {"crops": 3}, "crops belongs to the convention nanogpt"),
        (TEXT, {"convention": "nanogpt", "crops": 0}, "crops must be a whole number"),
        (TEXT, {"convention": "nanogpt", "seed": -1}, "seed must be a whole number"),
        (TEXT, {"convention": "nanogpt", "seed": 2**32}, "seed must be a whole number"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(ids: Any, arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert small().score(ids, **arguments).n_scored == 37
        return
    with pytest.raises((PromptError, SettingError), match=message):
        small().score(ids, **arguments)


def test_what_is_scored_from_the_end_of_text_needs_one() -> None:
    model = Model(small_params("prime"), CONFIGS["prime"], backend="numpy")
    for call in (lambda: model.score(TEXT, convention="lm-eval"), lambda: model.rank([], [[1]])):
        with pytest.raises(SettingError, match=r"token that begins a text .* has none"):
            call()


def test_one_token_can_be_scored_from_the_end_of_text() -> None:
    assert_logprobs(small().score([3], convention="lm-eval").logprobs, np.array([naive_logprob((EOS,), 3)]))


@pytest.mark.parametrize(
    ("prompt", "choices", "arguments", "message"),
    [
        ([1], [], {}, "at least one choice"),
        ([1], [[2], []], {}, "none may be empty"),
        ([1], [[101]], {}, "token id 101 is not in the model's vocabulary"),
        ([1], ["a"], {}, "choices must be a list"),
        ("a", "bc", {}, "choices must be a list"),
        ("a", ["b"], {}, "no tokenizer"),
        ([1], [[2]], {"by": "size"}, "by must be one of total, token, byte, not 'size'"),
        ([1], [[2]], {"by": "byte"}, "needs text"),
        ([1], [[2]], {"batch_size": 0}, "batch_size"),
        (TEXT[:37], [[2], [2, 3, 4]], {}, "have 40 tokens, and this model takes 37 and predicts one more: .* by 2"),
    ],
)  # fmt: skip
def test_bad_choices_are_one_clear_error(prompt: Any, choices: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((PromptError, SettingError), match=message):
        small().rank(prompt, choices, **arguments)


def test_a_prompt_may_fill_the_context() -> None:
    assert small().rank(TEXT[:37], [[2]])[0].logprob == pytest.approx(naive_logprob(tuple(TEXT[:37]), 2), rel=1e-4)


def test_damaged_weights_are_an_error() -> None:
    params = small_params("prime")
    params["ln_f"]["g"][3] = np.nan
    with pytest.raises(NumericalError, match="not finite in float32"):
        Model(params, CONFIG, backend="numpy").score(TEXT)


# Against transformers: pytest -m oracle


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("window", "stride"), [(37, 18), (19, 7), (23, 1), (29, 29)], ids=str)
def test_perplexity_is_that_of_transformers(backend: Backend, window: int, stride: int) -> None:
    """The loop of its page "Perplexity of fixed-length models", each window weighed by the tokens that it scores."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev,oracle]'")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev,oracle]'")
    from make_goldens import transformers_model

    theirs = transformers_model(CONFIG, small_params("prime"))
    ids = torch.tensor([TEXT])
    total = count = reached = 0
    for begin in range(0, len(TEXT), stride):
        labels = ids[:, begin : begin + window].clone()
        labels[:, : max(reached - begin, 0)] = -100  # not in the loss; nor is the first, which nothing predicts
        scored = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(theirs(ids[:, begin : begin + window], labels=labels).loss) * scored
        count, reached = count + scored, begin + window
        if reached >= len(TEXT):
            break
    score = small(backend).score(TEXT, window=window, stride=stride)
    assert score.n_scored == count
    assert score.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("convention", ["huggingface", "lm-eval"])
def test_several_texts_have_the_scores_of_each_alone(backend: Backend, convention: str) -> None:
    model = gpt_xp.load("shakespeare", backend=backend)
    texts = ["To be", "KING HENRY:\nWhat say you to that, my lord? " * 9, "Enter the king, and his men", "O night!"]
    options: dict[str, Any] = {"convention": convention, "window": 53, "batch_size": 3}
    for found, text in zip(model.score_each(texts, **options), texts, strict=True):
        alone = model.score(text, **options)
        np.testing.assert_array_equal(found.token_ids, alone.token_ids)
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-4)
        assert (found.n_bytes, found.n_words) == (alone.n_bytes, alone.n_words)
    assert model.score_each([]) == []
