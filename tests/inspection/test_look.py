"""`Model.look`: the numbers of the page, against `logits`, `score`, `trace` and `compare`."""

import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Result, children, posix, start
from comparison import TOLERANCE, assert_values
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend, quantized
from looks import random_look
from small_models import CONFIGS, small_params, small_tokens
from small_quantized import small

import gpt_xp
from gpt_xp import Backend, Model
from gpt_xp.config import SIZES, GPT2Config
from gpt_xp.errors import BackendError, CheckpointError, NumericalError, PromptError, SettingError
from gpt_xp.inspection import attention
from gpt_xp.inspection.look import histogram, largest_first
from gpt_xp.inspection.page import page
from gpt_xp.inspection.results import BINS, LENS_TOP, MAX_SIZE, TOP, Look

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"


def small_model(backend: str | Backend = "numpy", name: str = "prime") -> Model:
    return Model(small_params(name), CONFIGS[name], backend=backend)


def log_softmax(logits: Any) -> Any:
    wide = np.float64(logits)
    return (
        wide
        - np.log(np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
        - wide.max(axis=-1, keepdims=True)
    )


@pytest.fixture(scope="module")
def look() -> Look:
    return gpt_xp.load("shakespeare", backend="numpy").look(PROMPT)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_surprise_is_what_score_says(look: Look, shakespeare: Model) -> None:
    expected = -shakespeare.score(PROMPT).logprobs
    assert np.isnan(look.surprise[0])
    np.testing.assert_allclose(look.surprise[1:], expected[1:], rtol=0, atol=2e-6)


def test_the_last_position_has_all_logits(look: Look, shakespeare: Model) -> None:
    logits = shakespeare.logits(look.token_ids)
    assert look.predictions.position == len(look.token_ids) - 1
    np.testing.assert_allclose(look.predictions.all_logits, logits[-1], rtol=0, atol=1e-5)


def test_the_largest_logits_and_the_histogram_have_the_whole_probability(look: Look) -> None:
    """log(sum(exp(logits))) of each position, from the numbers of the page alone."""
    found = look.predictions
    assert found.ids.shape == (len(look.token_ids), TOP)
    logits = gpt_xp.load("shakespeare", backend="numpy").logits(look.token_ids).astype(np.float64)
    for row, ids, top, counts, levels in zip(logits, found.ids, found.logits, found.counts, found.levels, strict=True):
        assert sorted(row[ids], reverse=True) == pytest.approx(list(top), abs=1e-5)
        assert row[ids].min() >= np.delete(row, ids).max() - 1e-5
        assert counts.sum() == len(row) - TOP
        total = np.exp(top.astype(np.float64)).sum() + (counts * np.exp(levels.astype(np.float64))).sum()
        assert np.log(total) == pytest.approx(np.log(np.exp(row).sum()), abs=1e-5)
        hot = np.exp(top.astype(np.float64) / 10).sum() + (counts * np.exp(levels.astype(np.float64) / 10)).sum()
        assert np.log(hot) == pytest.approx(np.log(np.exp(row / 10).sum()), abs=1e-3)  # temperature 10


@settings(max_examples=100)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=200))
def test_a_histogram_counts_each_logit_once(logits: list[float]) -> None:
    counts, levels = histogram(np.array(logits))
    assert counts.sum() == len(logits)
    assert len(counts) == BINS
    total = np.log(sum(np.exp(np.float64(each) - 50) for each in logits))
    assert np.log((counts * np.exp(levels - 50)).sum()) == pytest.approx(total, abs=1e-9)


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(1, 25))
def test_of_equal_logits_the_lower_id_comes_first(row: list[int], count: int) -> None:
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert largest_first(np.array([row], float), count)[0].tolist() == expected


def test_the_lens_reads_each_layer_as_the_last(backend: Backend) -> None:
    model = small_model(backend)
    ids = small_tokens("prime")[0].tolist()
    found = model.look(ids).lens
    streams = model.trace(ids, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
    final = model.logits(ids).argmax(axis=-1)
    params = small_params("prime")
    assert found.ids.shape == (CONFIGS["prime"].n_layer + 1, len(ids), LENS_TOP)
    for row, (best, logprobs, chosen) in enumerate(zip(found.ids, found.logprobs, found.final, strict=True)):
        x = np.float64([*streams.values()][row])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        expected = log_softmax((x * params["ln_f"]["g"] + params["ln_f"]["b"]) @ params["wte"].T)
        np.testing.assert_allclose(logprobs, np.sort(expected)[:, : -LENS_TOP - 1 : -1], rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, best, 1), logprobs, rtol=0, atol=1e-4)
        np.testing.assert_allclose(expected[np.arange(len(ids)), final], chosen, rtol=0, atol=1e-4)


def test_the_lens_of_the_last_block_is_the_model(look: Look) -> None:
    expected = log_softmax(look.predictions.all_logits)
    best = look.lens.ids[-1, -1]
    np.testing.assert_array_equal(best, look.predictions.ids[-1, :LENS_TOP])
    np.testing.assert_allclose(look.lens.logprobs[-1, -1], expected[best], rtol=0, atol=1e-5)
    assert look.lens.final[-1, -1] == look.lens.logprobs[-1, -1, 0]


def test_attention_is_that_of_trace(backend: Backend) -> None:
    model = small_model(backend)
    ids = small_tokens("prime")[0].tolist()
    found = model.look(ids).attention
    expected = np.stack([*model.trace(ids, "blocks.*.attn.hook_pattern").values()])
    assert (found.kind, found.square) == ("float32", 1)
    np.testing.assert_array_equal(found.weights, expected[:, :, *np.tril_indices(len(ids))])
    np.testing.assert_array_equal(found.last, expected[:, :, -1])


def test_long_prompts_have_bytes_and_then_small_pictures(shakespeare: Model) -> None:
    ids = np.random.default_rng(3).integers(0, 1024, 101).tolist()
    expected = np.stack([*shakespeare.trace(ids, "blocks.*.attn.hook_pattern").values()])
    as_bytes = shakespeare.look(ids, max_size=1_000_000)
    assert as_bytes.attention.kind == "uint8"
    assert "rounded to 8 bits" in as_bytes.left_out[0]
    weights = (as_bytes.attention.weights / 255.0) ** 2
    assert np.abs(weights - expected[:, :, *np.tril_indices(101)]).max() <= 0.004
    np.testing.assert_allclose(as_bytes.attention.last, expected[:, :, -1], rtol=0, atol=1e-6)

    small = shakespeare.look(ids, max_size=350_000)
    side, square = small.attention.weights.shape[-1], small.attention.square
    assert small.attention.kind == "small"
    assert side * square >= 101 > (side - 1) * square
    assert f"the largest of {square} x {square} weights" in small.left_out[0]
    for row, column in ((0, 0), (side - 1, 1), (side - 1, side - 1)):
        area = expected[..., row * square : (row + 1) * square, column * square : (column + 1) * square]
        shown = (small.attention.weights[..., row, column] / 255.0) ** 2
        assert np.abs(shown - area.max(axis=(2, 3))).max() <= 0.004


def test_many_passes_give_the_same_weights(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    monkeypatch.setattr(attention, "PASS_BYTES", 1)
    found = gpt_xp.load("shakespeare", backend="numpy").look(PROMPT)
    np.testing.assert_array_equal(found.attention.weights, look.attention.weights)


def test_the_weights_of_the_last_token_are_rounded_where_they_are_many(
    monkeypatch: pytest.MonkeyPatch, look: Look
) -> None:
    monkeypatch.setattr(attention, "last_width", lambda config, n_seq: 2)
    found = gpt_xp.load("shakespeare", backend="numpy").look(PROMPT)
    assert found.attention.last.dtype == np.uint16
    assert np.abs(found.attention.last / 65535.0 - look.attention.last).max() <= 1 / 65535
    assert any("rounded to 16 bits" in each for each in found.left_out)


def test_a_long_prompt_has_the_lens_of_its_last_positions(shakespeare: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shakespeare.look(list(range(100))).lens.first == 0  # Logits of 1024 tokens are few.
    monkeypatch.setattr("gpt_xp.inspection.look.LENS_LOGITS", 0)
    found = shakespeare.look(list(range(100)))
    assert (found.lens.first, found.lens.ids.shape[1]) == (36, 64)
    assert "The logit lens has the last 64 of 100 positions." in found.left_out


def test_another_position_has_all_logits(shakespeare: Model, look: Look, tmp_path: Path) -> None:
    found = shakespeare.look(PROMPT, position=3)
    assert found.predictions.position == 3
    np.testing.assert_allclose(found.predictions.all_logits, shakespeare.logits(look.token_ids)[3], rtol=0, atol=1e-5)
    assert shakespeare.look(PROMPT, position=-2).predictions.position == len(look.token_ids) - 2
    shakespeare.look(PROMPT, position=np.int64(3)).save(tmp_path / "page.html")  # as np.argmax returns it


@pytest.mark.parametrize("n_seq", [1, 2])
def test_the_shortest_prompts(n_seq: int) -> None:
    found = small_model().look(list(range(n_seq)))
    assert found.surprise.shape == (n_seq,)
    assert found.attention.weights.shape == (2, 3, n_seq * (n_seq + 1) // 2)
    assert page(found)


def test_every_token_that_is_mentioned_has_its_bytes(look: Look, shakespeare: Model) -> None:
    tokenizer = shakespeare.tokenizer
    assert tokenizer is not None
    mentioned = {*look.token_ids, *look.predictions.ids.flat, *look.lens.ids.flat}
    assert look.vocabulary == {token: tokenizer.decode_bytes([token]) for token in mentioned}


def test_a_model_without_a_tokenizer_has_no_bytes() -> None:
    found = small_model().look([1, 2, 3])
    assert (found.vocabulary, found.prompt) == ({}, None)
    assert "#" in page(found)


def test_quantized_weights(backend: Backend) -> None:
    quantized(backend)  # or the test is skipped
    params, config = small("int8")
    model = Model(params, config, backend=backend)
    found = model.look([1, 2, 3])
    np.testing.assert_allclose(found.predictions.all_logits, model.logits([1, 2, 3])[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["torch", "mlx"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(name: str, dtype: str) -> None:
    ids = small_tokens("prime")[0].tolist()
    found = small_model(make_backend(name, dtype)).look(ids)
    expected = small_model().look(ids)
    allowed = TOLERANCE["logits", dtype]
    assert_values(found.predictions.all_logits, expected.predictions.all_logits, allowed)
    assert np.abs(np.exp(found.lens.logprobs[..., 0]) - np.exp(expected.lens.logprobs[..., 0])).max() < 2 * allowed
    assert page(found)


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_compare() -> None:
    found = gpt_xp.load("shakespeare", backend="numpy").look(PROMPT, "array-api-strict")
    expected = gpt_xp.compare("array-api-strict", "shakespeare", PROMPT, max_tokens=1)
    for ours, theirs in zip(found.distances, expected.runs, strict=True):
        assert theirs.figures is not None
        assert (ours.backend, ours.problems) == (theirs.backend, ())
        assert ours.relative is not None
        assert ours.allowed is not None
        largest = ours.relative.max(axis=1)
        assert list(largest[:-1]) == [layer.difference.relative for layer in theirs.figures.layers]
        assert list(ours.allowed[:-1]) == [layer.allowed for layer in theirs.figures.layers]
        assert largest[-1] == theirs.figures.logits.difference.relative
        assert ours.is_same is not None
        assert ours.is_same.mean() == theirs.figures.logits.top1_agreement


def test_a_backend_that_cannot_run_says_why() -> None:
    model = gpt_xp.load("shakespeare", backend="numpy", dtype="float64")
    [found] = model.look("To be", "jax@tpu").distances
    assert found.relative is None
    assert "tpu" in found.problems[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backends": "nump"}, BackendError, "there is no backend 'nump'"),
        ({"backends": []}, None, None),
        ({"position": 40}, SettingError, "position must be the number of one of the 2 tokens, from 0, not 40"),
        ({"position": 1.5}, SettingError, "position must be the number of one of the 2 tokens, from 0, not 1.5"),
        ({"position": "1"}, SettingError, "position must be the number of one of the 2 tokens, from 0, not '1'"),
        ({"max_size": 10_000}, SettingError, "max_size is 10000, and a page for .* tokens takes at least 50000 bytes"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: Any, message: str
) -> None:
    if error is None:
        assert shakespeare.look("To be", **options).distances == ()
        return
    monkeypatch.setattr(Model, "trace", lambda *args, **more: pytest.fail("it was computed"))
    with pytest.raises(error, match=message):
        shakespeare.look("To be", **options)


def test_a_prompt_beyond_the_context_is_refused(shakespeare: Model) -> None:
    with pytest.raises(PromptError, match="the prompt has 300 tokens"):
        shakespeare.look([1] * 300)


def test_damaged_weights_are_an_error() -> None:
    params = small_params("prime")
    params["blocks"][1]["mlp"]["c_proj"]["b"][0] = np.nan
    with pytest.raises(NumericalError, match="logits are not finite in float32"):
        Model(params, CONFIGS["prime"], backend="numpy").look([1, 2])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("n_seq", [1, 2, 64, 256, 1024])
def test_every_length_and_size_of_model_fits_eight_megabytes(config: GPT2Config, n_seq: int) -> None:
    found = random_look(config, n_seq)
    assert len(page(found).encode()) <= MAX_SIZE
    assert found.attention.kind != "small" or found.attention.weights.shape[2] >= 20  # It can still be recognized.


def test_weights_that_cannot_be_compressed_become_pictures(shakespeare: Model) -> None:
    """Rounded weights of 101 tokens take 0.8 of their bytes; there is room for 0.7 of them."""
    n_weights = 36 * 101 * 102 // 2
    ids = np.random.default_rng(3).integers(0, 1024, 101).tolist()
    assert attention.attention_of(shakespeare, ids, n_weights).kind == "uint8"
    found = attention.attention_of(shakespeare, ids, int(0.7 * n_weights))
    assert (found.kind, found.square) == ("small", 2)


@pytest.mark.parametrize("n_seq", [11, 256])
def test_the_page_is_no_larger_than_it_may_be(shakespeare: Model, n_seq: int) -> None:
    ids = np.random.default_rng(n_seq).integers(0, 1024, n_seq).tolist()
    for max_size in (800_000, 1_500_000):
        assert len(page(shakespeare.look(ids, max_size=max_size)).encode()) <= max_size
    with pytest.raises(SettingError, match=r"a page for .* takes at least") as error:
        shakespeare.look(ids, max_size=60_000)
    least = int(str(error.value).split()[-2])
    assert len(page(shakespeare.look(ids, max_size=least)).encode()) <= least


# --- the page as a file -----------------------------------------------------------------------------------------------


def test_a_page_is_saved_whole_or_not_at_all(tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    look.save(tmp_path / "out.html")
    before = (tmp_path / "out.html").read_bytes()
    assert before == page(look).encode()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"out\.html .*No space left.* it needs .* there"):
        look.save(tmp_path / "out.html")
    assert [each.name for each in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_bytes() == before


def test_a_notebook_shows_the_page_in_a_frame(look: Look) -> None:
    frame = look._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert frame.count("<") == 2  # Nothing of the page is outside the attribute.


def test_nothing_in_a_prompt_becomes_html(shakespeare: Model) -> None:
    prompt = "</script><img src=x onerror=alert(1)><!--"
    found = page(shakespeare.look(prompt))
    assert "onerror" not in found
    assert found.count("</script>") == page(shakespeare.look("To be")).count("</script>")


def test_the_numbers_are_compressed_and_the_policy_forbids_the_network(look: Look) -> None:
    text = page(look)
    assert "default-src 'none'" in text
    assert "connect-src" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "connect-src 'self'" in page(look, server=True)
    assert zlib.decompress(gpt_xp.inspection.page.pack(look))


# --- the command ------------------------------------------------------------------------------------------------------


def test_tables_in_the_terminal(call: Callable[..., Result]) -> None:
    found = call("look", "-m", "shakespeare", "--backends", "numpy", "To be, or not")
    assert found.code == 0
    assert "shakespeare, numpy" in found.out
    for title in ("surprise, nats", 'next token after " not"', 'logit lens after " not"', 'attention of " not"'):
        assert title in found.out
    assert "numpy f32: inside the tolerance; the same likeliest token at 5 of 5 positions" in found.out
    assert max(map(len, found.out.splitlines())) <= 80


def test_tables_of_any_length(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a page has a limit of its size, and only a page needs all weights of attention."""
    monkeypatch.setattr("gpt_xp.inspection.look.MAX_SIZE", 10)
    found = call("look", "-m", "shakespeare", "to be or not " * 20)
    assert (found.code, found.err) == (0, "")
    assert 'attention of "' in found.out


def test_a_look_is_one_line_and_equal_to_itself_alone(look: Look, shakespeare: Model) -> None:
    assert repr(look) == f"<Look: {look.model}, {len(look.token_ids)} tokens, {PROMPT!r:.60}>"
    assert look == look  # noqa: PLR0124
    assert look != shakespeare.look(PROMPT)


def test_a_page_by_the_command(call: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    found = call("look", "-m", "shakespeare", "--html", str(file), "To be")
    assert (found.code, found.out) == (0, "")
    assert f"{file} has " in found.err
    assert "shakespeare: gpt-xp look" in file.read_text(encoding="utf-8")


def test_a_page_says_on_stderr_which_backend_failed(call: Callable[..., Result], tmp_path: Path) -> None:
    found = call("look", "-m", "shakespeare", "--html", str(tmp_path / "o.html"), "--backends", "numpy,jax@tpu", "To")
    assert "numpy f32: inside the tolerance" in found.err
    assert "jax@tpu f32: FAILED: " in found.err


@posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "args",
    [("look", "--backends", "numpy", "To be"), ("compare", "--backends", "numpy", "To be"), ("conform", "numpy")],
)
def test_sigterm_leaves_no_process_and_no_file(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = start(*args, "-m", "shakespeare")
    end = time.monotonic() + PATIENCE
    while not (workers := children(running.pid)) and time.monotonic() < end:
        assert running.poll() is None, "it has ended before its time"
        time.sleep(0.01)
    time.sleep(0.3)  # A process that is just being started is not known to its parent.
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, out) == (-signal.SIGTERM, b"")
    assert b"Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_current_directory_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('this file of the user was run')")
    script = str(Path(sys.executable).with_name("gpt-xp"))
    done = subprocess.run(
        [script, "look", "-m", "shakespeare", "--backends", "numpy", "To be"], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "numpy f32: inside the tolerance" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "no/such/out.html"], "a page cannot be written to no/such/out.html: there is no directory no/such"),
        (["--backends", "nump"], "there is no backend 'nump'"),
        (["--max-size", "10k", "--html", "out.html"], "--max-size is 10240, and a page for 2 tokens takes at least"),
        (["--max-size", "many", "--html", "out.html"], "'many' is not a size"),
        (["--serve", "--port", "70000"], "70000 is not in the range"),
    ],
)
def test_mistakes_of_the_command(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call("look", "-m", "shakespeare", *options, "To be")
    assert found.code in (1, 2)
    assert message in found.err
    assert found.out == ""
    assert not [*tmp_path.iterdir()]


def test_options_without_effect_are_named(call: Callable[..., Result]) -> None:
    found = call("look", "-m", "shakespeare", "--port", "8000", "--max-size", "1M", "To be")
    assert "--max-size has no effect without --html or --serve" in found.err
    assert "--port has no effect without --serve" in found.err
