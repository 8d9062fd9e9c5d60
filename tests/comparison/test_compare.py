"""`gpt-xp compare`: the figures against hand-made numbers, right backends that pass, and wrong ones that are caught."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import naive_gpt2
import numpy as np
import pytest
from commands import PATIENCE, Result, posix, process, start
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens, tree_map
from third_party import third_party_installed, with_large_scores

import gpt_xp
from gpt_xp import Model
from gpt_xp.comparison import figures, plot, report, worker
from gpt_xp.comparison.figures import ComparisonFigures, Difference, Flip, LayerFigures, LogitFigures
from gpt_xp.comparison.job import PROMPTS
from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.comparison.worker import TRACED_CHUNK_TOKENS
from gpt_xp.errors import BackendError, CheckpointError, PromptError, SettingError
from gpt_xp.installation import install_command
from gpt_xp.reporting import plots as _plots
from gpt_xp.tolerances import TOLERANCE

SHORT = ["ROMEO:", "My lord, I"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_difference_is_over_all_prompts_together():
    a = [np.array([1.0, 2.5]), np.array([[3.0], [4.0], [-8.5]])]
    b = [np.array([1.0, 2.0]), np.array([[3.25], [4.0], [-8.0]])]
    assert figures.difference(a, b) == Difference(max=0.5, mean=0.25, relative=0.0625)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_differs_infinitely(wrong):
    found = figures.difference([np.array([1.0, wrong])], [np.array([1.0, 2.0])])
    assert found == Difference(math.inf, math.inf, math.inf)


def test_the_divergence_of_two_coins():
    p, q = 0.75, 0.5
    nats = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    logits = np.log([[0.75, 0.25]]) + 11.0  # a shift of all logits changes nothing
    assert figures.kl_divergence(np.log([[0.5, 0.5]]), logits) == pytest.approx([nats], rel=1e-12)
    assert figures.kl_divergence(logits, logits) == [0.0]
    assert figures.kl_divergence(np.array([[np.nan, 1.0]]), logits) == [np.inf]


def test_each_flip_has_the_lead_that_was_lost():
    expected = [np.array([[1.0, 5.0, 2.0], [7.0, 6.5, 0.0]]), np.array([[0.0, 1.0, 4.0]])]
    actual = [np.array([[1.0, 5.0, 2.0], [6.4, 6.5, 0.0]]), np.array([[0.0, 4.1, 4.0]])]
    found = figures.compare_logits(actual, expected)
    assert found.top1_agreement == pytest.approx(1 / 3)
    assert found.flips == (Flip(0, 1, 1, 0, 0.5), Flip(1, 0, 1, 2, 3.0))


def test_tokens_are_compared_step_by_step_and_texts_from_their_beginning():
    found = figures.compare_tokens(
        forced=[[(3, 0.1), (4, 0.2)], [(5, 0.3), (7, 0.4)]],
        expected=[[(3, 0.5), (4, 0.6)], [(5, 0.7), (6, 0.01)]],
        free=[[3, 4], [9, 6]],
        free_expected=[[3, 4], [5, 6]],
    )
    assert found == figures.TokenFigures(4, (Flip(1, 1, 7, 6, 0.01),), (2, 0), 2)


def layers(*relative: float) -> tuple[LayerFigures, ...]:
    each = [np.full((4, 1, 1), 1.0) for _ in range(1)]
    wrong = each[0] + np.array(relative)[:, None, None]
    return figures.compare_layers([wrong], each, "float32")


def test_the_first_layer_out_of_line_depends_on_the_depth():
    row = 10 * TOLERANCE["layer", "float32"]
    assert [layer.name for layer in layers(0, 0, 0, 0)] == ["embedding", "block 0", "block 1", "ln_f"]

    def first(*relative: float) -> str | None:
        logits = LogitFigures(Difference(0, 0, 0), 0, 0, 1, ())
        layer = ComparisonFigures(layers(*relative), logits).first_out_of_line
        return layer and layer.name

    assert first(0.9 * row, 1.9 * row, 2.9 * row, 3.9 * row) is None
    assert first(0.9 * row, 1.9 * row, 3.1 * row, 3.9 * row) == "block 1"
    assert first(1.1 * row, 3 * row, 0, 0) == "embedding"
    assert first(0, 0, np.nan, 0) == "block 1"


def test_a_tie_is_told_from_an_error():
    tolerance = TOLERANCE["logits", "float32"]

    def problems(margin: float, relative: float = 0.0) -> list[str]:
        logits = LogitFigures(Difference(0, 0, relative), 0, 0, 1, (Flip(0, 3, 1, 2, margin),))
        return ComparisonFigures((), logits).problems("float32", largest_logit=50.0)

    assert problems(1.9 * tolerance * 50) == []
    [wrong] = problems(2.1 * tolerance * 50)
    assert "token 1 instead of 2 in prompt 0, position 3" in wrong
    [wrong] = problems(0.0, relative=1.1 * tolerance)
    assert "the logits differ by 2.2e-05 of the largest (allowed: 2.0e-05)" in wrong


# --- the trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prime", "long"])
def test_a_trace_is_what_a_naive_forward_pass_leaves_on_the_way(name):
    """In float64, block by block; "long" has several pieces."""
    config, params = CONFIGS[name], small_params(name)
    ids = small_tokens(name)[0].tolist()
    found, logits = worker.trace(Model(params, config, backend=make_backend("numpy", "float64")), ids)
    x = np.array([params["wte"][token] + params["wpe"][place] for place, token in enumerate(ids)])
    expected = [x]
    for block in params["blocks"]:
        expected.append(naive_gpt2.transformer_block(expected[-1], **block, n_head=config.n_head))
    expected.append(naive_gpt2.layer_norm(expected[-1], **params["ln_f"]))
    assert found.shape == (config.n_layer + 2, len(ids), config.n_embd)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-12 * np.abs(theirs).max()
    theirs = naive_gpt2.gpt2(ids, **params, n_head=config.n_head)
    assert np.abs(logits - theirs).max() <= 1e-12 * np.abs(theirs).max()


def test_a_trace_of_any_backend_is_what_the_model_computes(backend):
    config = CONFIGS["long"]
    model = Model(small_params("long"), config, backend=backend)
    ids = small_tokens("long")[1].tolist()
    found, logits = worker.trace(model, ids)
    assert found.shape == (config.n_layer + 2, len(ids), config.n_embd)
    whole = model.logits(ids)
    assert np.abs(logits - whole).max() <= TOLERANCE["same", "float32"] * np.abs(whole).max()


def test_following_a_text_that_is_ones_own_changes_nothing(backend):
    model = Model(small_params("prime"), CONFIGS["prime"], backend=backend)
    for temperature in (0.0, 1.0):
        out = model.generate([1, 2, 3], temperature=temperature, seed=5, max_tokens=11, ignore_eos=True)
        settings = gpt_xp.GenerationSettings(temperature=temperature, seed=5)
        choices = worker.follow(model, [1, 2, 3], out.token_ids, settings)
        assert [token for token, _ in choices] == out.token_ids
        assert [margin for _, margin in choices] == pytest.approx(out.margins, rel=1e-4, abs=1e-4)


# --- whole comparisons ------------------------------------------------------------------------------------------------


def test_the_longest_prompt_is_read_in_two_pieces_and_leaves_room(shakespeare):
    assert len(set(PROMPTS)) == len(PROMPTS)
    assert TRACED_CHUNK_TOKENS < max(len(shakespeare.tokenizer.encode(prompt)) for prompt in PROMPTS) < 256 - 32


def test_numpy_against_itself():
    found = gpt_xp.compare(["numpy"], "shakespeare", SHORT, dtypes=["float32", "float64", "float16"], max_tokens=5)
    single, double, half = found.runs
    assert found.is_ok
    assert single.figures is not None
    assert 0 < single.figures.logits.difference.relative < TOLERANCE["logits", "float32"]
    assert single.figures.first_out_of_line is None
    assert double.figures is not None
    assert double.figures.logits.difference.max == 0.0
    assert double.figures.tokens["sampled"].shared == (5, 5)
    assert half.skipped is not None
    assert "numpy does not compute in float16" in half.skipped
    assert found.prompts == tuple(SHORT)
    assert single.settings
    assert single.speed["decode_tokens_per_second"] > 0


def test_jax_agrees_and_is_not_loaded_here():
    make_backend("jax")
    code = f"""
import json, sys, gpt_xp
found = gpt_xp.compare(["numpy", "jax@cpu"], "shakespeare", {SHORT!r}, max_tokens=5)
assert found.is_ok, found
print(json.dumps(found.as_dict(), allow_nan=False))
assert not {{"jax", "torch", "cupy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["is_ok"]
    assert [run["backend"] for run in content["runs"]] == ["numpy", "jax@cpu"]
    assert content["runs"][1]["device"] == "cpu"
    assert content["runs"][1]["first_layer_out_of_line"] is None
    assert [layer["name"] for layer in content["runs"][1]["figures"]["layers"]][-1] == "ln_f"


def test_what_cannot_be_compared_is_said_at_once():
    for arguments, error, message in (
        ({"backends": ["nump"]}, BackendError, "there is no backend 'nump'; there are: numpy"),
        ({"backends": []}, SettingError, "no backend"),
        ({"backends": ["numpy"], "dtypes": ["float8"]}, SettingError, "there is no dtype 'float8'"),
        ({"backends": ["numpy"], "max_tokens": 0}, SettingError, "max_tokens"),
        ({"backends": ["numpy"], "max_tokens": 256}, SettingError, "the context of 256"),
        ({"backends": ["numpy"], "prompts": ["x" * 900]}, PromptError, "the context of 256"),
        ({"backends": ["numpy"], "prompts": [""]}, PromptError, "0 tokens"),
    ):
        with pytest.raises(error, match=message):
            gpt_xp.compare(**{"model": "shakespeare", **arguments})  # type: ignore[arg-type]


def test_a_backend_that_fails_is_a_problem_and_not_the_end():
    found = gpt_xp.compare(["numpy@cuda:0", "numpy"], "shakespeare", ["A"], max_tokens=2)
    failed, fine = found.runs
    assert not found.is_ok
    assert not failed.is_ok
    assert failed.figures is None
    assert "numpy has no device 'cuda:0'" in failed.problems[0]
    assert fine.is_ok
    assert "FAILED: numpy has no device" in report.verdict(found)


# --- wrong backends, from a package of somebody else's ----------------------------------------------------------------


@pytest.fixture
def third_party() -> Iterator[None]:
    with third_party_installed():
        yield


@pytest.fixture(scope="module")
def others() -> dict[str, BackendResult]:
    """The result of each backend of the package that needs no special checkpoint."""
    names = ["right-numpy", "wrong-float16", "wrong-gelu", "wrong-cache", "wrong-softmax"]
    with third_party_installed():
        return dict(zip(names, gpt_xp.compare(names, "shakespeare", SHORT, max_tokens=5).runs, strict=True))


@pytest.fixture
def large_scores(tmp_path: Path, shakespeare: Model) -> str:
    """A checkpoint with attention scores above 100 in layer 3."""
    params = with_large_scores(tree_map(np.array, shakespeare.params), shakespeare.config, layer=3)
    Model(params, shakespeare.config, shakespeare.tokenizer, "numpy").save(tmp_path / "large")
    return str(tmp_path / "large")


def test_a_right_backend_of_a_third_party_passes(others):
    assert others["right-numpy"].is_ok
    assert others["right-numpy"].backend == "right-numpy"


@pytest.mark.parametrize("name", ["wrong-float16", "wrong-gelu", "wrong-cache"])
def test_a_wrong_backend_is_caught_and_the_layer_named_where_it_begins(others, name):
    run = others[name]
    assert run.figures is not None
    layer = run.figures.first_out_of_line
    assert layer is not None
    assert layer.name == "block 0"
    assert run.problems[0].startswith("block 0 differs by ")


def test_a_softmax_that_overflows_is_caught_on_a_checkpoint_made_for_it(
    others, third_party, large_scores, call, monkeypatch
):
    found = gpt_xp.compare(["right-numpy", "wrong-softmax"], large_scores, SHORT, max_tokens=5)
    right, wrong = found.runs
    assert right.is_ok, right.problems
    assert wrong.figures is not None
    assert wrong.figures.first_out_of_line is not None
    assert wrong.figures.first_out_of_line.name == "block 3"
    assert wrong.figures.layers[3].difference.relative < 1e-5  # block 2
    assert not math.isfinite(wrong.figures.logits.difference.max)
    assert any("not finite" in problem for problem in wrong.problems)  # nothing could be generated
    assert others["wrong-softmax"].is_ok, "the ordinary checkpoint does not show it"
    result = shown(call, monkeypatch, found, "--json")
    assert result.code == 1
    _, run = json.loads(result.out)["runs"]
    assert run["figures"]["logits"]["difference"]["max"] is None
    assert run["first_layer_out_of_line"] == "block 3"
    json.loads(result.out, parse_constant=pytest.fail)  # no NaN, no Infinity: they are not JSON


def test_a_third_party_backend_goes_with_its_package():
    with pytest.raises(BackendError, match="there is no backend 'right-numpy'"):
        gpt_xp.compare(["right-numpy"], "shakespeare", SHORT)


# --- the command ------------------------------------------------------------------------------------------------------

COMPARE = ("compare", "-m", "shakespeare", "-n", "3", "ROMEO:")


@pytest.fixture(scope="module")
def found() -> Comparison:
    """A comparison of which the command shows the result in each of its ways."""
    names, dtypes = ["numpy", "numpy@cuda:0"], ["float32", "float16"]
    return gpt_xp.compare(names, "shakespeare", ["ROMEO:"], dtypes=dtypes, max_tokens=3)


def shown(call: Callable[..., Result], patch: pytest.MonkeyPatch, found: Comparison, *options: str) -> Result:
    """Return what the command shows of a comparison that has been computed already."""
    patch.setattr("gpt_xp.compare", lambda *arguments, **settings: found)
    return call(*COMPARE, *options)


def test_the_report_fits_a_terminal_of_80_columns(call, monkeypatch, found):
    result = shown(call, monkeypatch, found)
    assert result.code == 1
    assert result.err == ""
    assert max(map(len, result.out.splitlines())) <= 80
    assert [block.split()[0] for block in result.out.split("\n\n")][1:4] == ["logits", "tokens", "tokens"]
    assert "numpy float32: inside the tolerance" in result.out
    assert "numpy float16: skipped, numpy does not compute in float16" in result.out
    assert "numpy@cuda:0 float32: FAILED: numpy has no device" in result.out
    assert "numpy float32 on cpu: version " in result.out
    wide = dataclasses.replace(found.runs[0], backend="array-api-strict", dtype="bfloat16")
    text = report.as_text(dataclasses.replace(found, runs=(wide,)), layers=True)
    assert max(map(len, text.splitlines())) <= 80


def test_exit_codes(call, third_party):
    assert process(*COMPARE, "--backends", "numpy").code == 0
    wrong = process(*COMPARE, "--backends", "wrong-gelu")
    assert wrong.code == 1
    assert "wrong-gelu float32: OUTSIDE: block 0 differs by " in wrong.out
    unknown = call(*COMPARE, "--backends", "nump")
    assert (unknown.code, unknown.out) == (1, "")
    assert "there is no backend 'nump'" in unknown.err
    assert call(*COMPARE, "--max-tokens", "0").code == 2


@posix
def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = start("compare", "-m", "shakespeare", "--backends", "numpy", "-n", "60")
    end = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("*/reference/job.json")) and time.monotonic() < end:
        assert running.poll() is None, "it has ended before its time"
        time.sleep(0.01)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_json_and_markdown(call, monkeypatch, found):
    content = json.loads(shown(call, monkeypatch, found, "--json").out)
    assert content["schema"] == 2
    assert content["runs"][0]["figures"]["logits"]["difference"]["max"] > 0
    assert content["config"]["n_layer"] == 6
    text = shown(call, monkeypatch, found, "--markdown", "--layers").out
    names = ["embedding", *(f"block {layer}" for layer in range(6)), "ln_f"]
    assert [line.split(" | ")[0][2:] for line in text.splitlines() if line.endswith("e-05 |")] == names[1:]
    assert "| logits | max diff | mean diff | KL mean | KL max | top-1 | begins at |\n| --- |" in text
    assert "| numpy f32 | " in text


def test_a_plot(call, monkeypatch, found, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, magic in (("out.png", b"\x89PNG"), ("out.svg", b"<?xml")):
        result = shown(call, monkeypatch, found, "--plot", str(tmp_path / name))
        assert (result.code, result.err) == (1, "")
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.svg"]
    monkeypatch.setattr("gpt_xp.compare", lambda *arguments, **settings: pytest.fail("it has begun"))
    for name in ("out.xyz", "out", "no-such-directory/out.png"):
        wrong = call(*COMPARE, "--backends", "numpy", "--plot", str(tmp_path / name))
        assert (wrong.code, wrong.out) == (1, "")
        assert f"a plot cannot be written to {tmp_path / name}" in wrong.err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=re.escape(install_command("plot"))):
        plot.check_plot(Path("out.png"))


def test_one_prompt_is_a_list_of_one():
    found = gpt_xp.compare("numpy", "shakespeare", "My lord", max_tokens=2)
    assert found.prompts == ("My lord",)
    assert [(run.backend, run.dtype) for run in found.runs] == [("numpy", "float32")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("suffix", _plots.SUFFIXES)
def test_a_plot_on_a_full_disk_names_its_file(tmp_path, monkeypatch, suffix):
    figure = pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path, **settings: save(self, "/dev/full", **settings))
    path = tmp_path / f"out{suffix}"
    with pytest.raises(CheckpointError, match=rf"cannot write {path} \(.*; it needs 100.0 kB there: make room"):
        _plots.save_figure(_plots.new_figure(1, 1, figsize=(3, 2))[0], path)
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_fails_comes_after_the_figures(call, monkeypatch, found):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def full(*args: object) -> None:
        raise CheckpointError("cannot write out.png")

    monkeypatch.setattr("gpt_xp.comparison.plot.save_figure", full)
    result = shown(call, monkeypatch, found, "--plot", "out.png")
    assert (result.code, result.err) == (1, "gpt-xp: error: cannot write out.png\n")
    assert "numpy f32" in result.out
