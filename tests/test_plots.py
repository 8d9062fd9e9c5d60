"""The plots of compare, bench and train: what a reader needs to decide by them is in the picture."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from gpt_xp import GPT2Config
from gpt_xp.benchmark.figures import Spread, Turn, Workload, workload_figures
from gpt_xp.benchmark.results import Benchmark, ContenderResult
from gpt_xp.comparison.figures import ComparisonFigures, Difference, LayerFigures, LogitFigures, layer_names
from gpt_xp.comparison.results import BackendResult, Comparison
from gpt_xp.training.log import Evaluation

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

CONFIG = GPT2Config(n_vocab=101, n_ctx=37, n_embd=39, n_head=3, n_layer=2)


def run(backend: str, dtype: str, *errors: float, rate: float | None = 100.0) -> BackendResult:
    """Return a run with the error of each layer: embedding, two blocks, ln_f."""
    layers = tuple(
        LayerFigures(name, Difference(error, error, error), 1e-5 * (depth + 1))
        for depth, (name, error) in enumerate(zip(layer_names(2), errors, strict=True))
    )
    logits = LogitFigures(Difference(1e-6, 1e-6, 1e-6), 0.0, 0.0, 1.0, ())
    speed = {"prefill_tokens_per_second": rate and 20 * rate, "decode_tokens_per_second": rate}
    return BackendResult(backend, dtype, "cpu", "1", speed=speed, figures=ComparisonFigures(layers, logits))


def comparison(*runs: BackendResult) -> Any:
    from gpt_xp.comparison.plot import draw

    reference = BackendResult("numpy", "float64")
    return draw(Comparison("shakespeare", CONFIG, ("To be",), (2,), 8, 0, reference, runs))


def benchmark(workloads: list[Workload], *names: str) -> Any:
    from gpt_xp.benchmark.plot import draw

    def result(place: int, name: str) -> ContenderResult:
        turns = [[Turn(w.context * (place + 1) / 1000, 0.02 * (place + 1) * (1 + w.context / 1000))] for w in workloads]
        figures = tuple(workload_figures(each, w) for each, w in zip(turns, workloads, strict=True))
        return ContenderResult(name, is_floor=name == "floor", figures=figures)

    return draw(Benchmark("a model", tuple(workloads), 7, 2, None, tuple(map(result, range(9), names)), {}))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def line(axes: Any, label: str) -> Any:
    return next(each for each in axes.lines if each.get_label() == label)


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# --- all --------------------------------------------------------------------------------------------------------------


def test_a_library_has_one_color_in_every_panel_of_every_plot() -> None:
    one = comparison(run("torch", "float32", 0, 1e-7, 1e-7, 1e-7), run("numpy", "float32", 0, 1e-7, 2e-7, 1e-7))
    two = benchmark([Workload(16), Workload(128)], "gpt-xp jax", "gpt-xp numpy+int8", "gpt-xp torch@cuda bf16")
    color = line(one.axes[0], "torch float32").get_color()
    bars = {matplotlib.colors.to_hex(axes.patches[0].get_facecolor()) for axes in one.axes[1:]}
    assert bars == {color.lower()}
    assert line(two.axes[0], "gpt-xp torch@cuda bf16").get_color() == color
    assert line(two.axes[1], "gpt-xp torch@cuda bf16").get_color() == color
    assert line(two.axes[0], "gpt-xp numpy+int8").get_color() == line(one.axes[0], "numpy float32").get_color() != color


def test_a_library_that_is_not_known_has_one_color_whatever_is_beside_it() -> None:
    names = ["transformers", "CTranslate2 f32", "llama.cpp F32", "dask f32"]
    together = benchmark([Workload(16), Workload(128)], "gpt-xp numpy", *names)
    colors = {name: line(together.axes[0], name).get_color() for name in names}
    assert len(set(colors.values())) == len(names)
    for name in names[:3]:
        alone = benchmark([Workload(16), Workload(128)], name)
        assert line(alone.axes[0], name).get_color() == colors[name]


def test_variants_of_a_library_differ_in_more_than_the_color() -> None:
    axes = comparison(run("torch", "float32", 0, 1e-7, 1e-7, 1e-7), run("torch", "float16", 0, 1e-3, 1e-3, 1e-3)).axes
    one, other = line(axes[0], "torch float32"), line(axes[0], "torch float16")
    assert one.get_color() == other.get_color()
    assert (one.get_marker(), one.get_linestyle()) != (other.get_marker(), other.get_linestyle())
    first, second = axes[1].patches
    assert (first.get_hatch(), second.get_hatch()) == (None, "//")


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_the_background_is_white_whatever_the_user_s_style_is(style: str) -> None:
    import matplotlib.style

    with matplotlib.style.context(style):
        figure = comparison(run("jax", "float32", 0, 1e-7, 1e-7, 1e-7))
    assert {matplotlib.colors.to_hex(each.get_facecolor()) for each in (figure, *figure.axes)} == {"#ffffff"}


# --- compare ----------------------------------------------------------------------------------------------------------


def test_the_limit_is_called_allowed_and_the_direction_is_said() -> None:
    figure = comparison(run("jax", "float32", 0, 1e-7, 1e-7, 1e-7))
    assert "allowed (float32)" in texts(figure)
    assert sum("lower is better" in text for text in texts(figure)) == 1
    assert sum("higher is better" in text for text in texts(figure)) == 2


def test_bars_have_their_numbers_at_the_ends() -> None:
    figure = comparison(
        run("jax", "float32", 0, 1e-7, 1e-7, 1e-7, rate=23.456), run("mlx", "float32", 0, 1e-7, 1e-7, 1e-7, rate=None)
    )
    assert {"23.5", "469", "-"} <= set(texts(figure))
    labels = [text for text in figure.axes[2].texts if text.get_text() == "23.5"]
    assert [label.xy for label in labels] == [(23.456, 0)]


def test_an_error_of_zero_is_shown_as_zero() -> None:
    axes = comparison(run("numpy", "float64", 0, 0, 1e-16, 0)).axes[0]
    [y] = [y for y, label in zip(axes.get_yticks(), ticks(axes.yaxis), strict=True) if label == "0"]
    [zeros] = [each for each in axes.lines if set(each.get_ydata()) == {y}]
    assert list(zeros.get_xdata()) == [0, 1, 3]
    assert y < 1e-16
    low, high = axes.get_ylim()
    assert low < y < high


def test_an_error_that_is_not_finite_is_shown_above_all_others() -> None:
    axes = comparison(run("cupy", "float16", 0, np.inf, 1e-3, np.nan)).axes[0]
    [y] = [y for y, label in zip(axes.get_yticks(), ticks(axes.yaxis), strict=True) if "finite" in label]
    [marks] = [each for each in axes.lines if set(each.get_ydata()) == {y}]
    assert list(marks.get_xdata()) == [1, 3]
    assert y > 1e-3


def test_zeros_of_several_backends_do_not_hide_each_other() -> None:
    runs = [run(name, "float32", 0, 1e-7, 1e-7, 1e-7) for name in ("numpy", "jax", "torch")]
    axes = comparison(*runs).axes[0]
    [y] = [y for y, label in zip(axes.get_yticks(), ticks(axes.yaxis), strict=True) if label == "0"]
    zeros = {each.get_color(): each.get_xdata()[0] for each in axes.lines if set(each.get_ydata()) == {y}}
    assert len(zeros) == len(set(zeros.values())) == 3
    assert sum(zeros.values()) == pytest.approx(0)  # around the embedding
    assert max(zeros.values()) < 0.5


def test_each_dtype_has_its_own_limit() -> None:
    figure = comparison(run("jax", "float32", 0, 1e-7, 1e-7, 1e-7), run("jax", "float64", 0, 1e-16, 1e-16, 1e-16))
    assert {"allowed (float32)", "allowed (float64)"} <= set(texts(figure))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["jax float32", "jax float64", "allowed"]


def test_the_line_and_the_bar_of_a_run_are_told_apart_from_its_other_dtype_in_the_same_way() -> None:
    untimed = dataclasses.replace(run("jax", "float16", 0, 1e-3, 1e-3, 1e-3), speed={})
    axes = comparison(untimed, run("jax", "float32", 0, 1e-7, 1e-7, 1e-7)).axes
    assert line(axes[0], "jax float32").get_linestyle() == "--"
    assert [bar.get_hatch() for bar in axes[1].patches] == ["//"]


def test_a_comparison_without_speed_has_no_empty_panels() -> None:
    figure = comparison(BackendResult("jax", "float32", problems=("it crashed",)))
    assert len(figure.axes) == 1
    assert "no backend could be compared" in texts(figure)


# --- bench ------------------------------------------------------------------------------------------------------------


def test_ticks_are_at_what_was_measured() -> None:
    figure = benchmark([Workload(64, batch) for batch in (1, 2, 8)], "gpt-xp numpy", "floor")
    assert ticks(figure.axes[0].xaxis) == ["1", "2", "8"]
    figure = benchmark([Workload(context) for context in (16, 128, 512)], "gpt-xp numpy", "floor")
    assert [ticks(axes.xaxis) for axes in figure.axes] == [["16", "128", "512"]] * 2


def test_lines_have_their_numbers_at_the_ends_apart_from_each_other() -> None:
    names = ["gpt-xp numpy", "gpt-xp jax", "gpt-xp torch", "floor"]
    axes = benchmark([Workload(16), Workload(128)], *names).axes[0]
    assert {text.get_text().split("  ")[1] for text in axes.texts} == set(names)
    assert {text.get_text().split("  ")[0] for text in axes.texts} == {"22.6", "45.1", "67.7", "90.2"}
    assert_apart(axes)


@pytest.mark.parametrize("slowest", [0.01, 0.02, 0.5])
def test_lines_that_end_at_one_place_have_labels_apart(slowest: float) -> None:
    """At the top of the axes, in the middle, and at the bottom."""
    from gpt_xp.benchmark.plot import draw

    workloads = (Workload(16), Workload(128))
    results = [
        ContenderResult(
            name, figures=tuple(workload_figures([Turn(10 * seconds, seconds)], each) for each in workloads)
        )
        for name, seconds in (("numpy", 0.01), ("jax", 0.01), ("torch", 0.01), ("mlx", slowest))
    ]
    for axes in draw(Benchmark("a model", workloads, 7, 2, None, tuple(results), {})).axes:
        assert_apart(axes)
        assert max(box_of(text).y1 for text in axes.texts) < box_of(axes._left_title).y1
        assert min(box_of(text).y1 for text in axes.texts) > axes.bbox.y0


def box_of(text: Any) -> Any:
    """Return the place of a text alone; that of an annotation has its line too."""
    return matplotlib.text.Text.get_window_extent(text)


def assert_apart(axes: Any) -> None:
    """No label covers another one, or only by a pixel."""
    axes.figure.draw_without_rendering()
    boxes = sorted(map(box_of, axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))


def test_a_slow_round_does_not_flatten_the_lines() -> None:
    from gpt_xp.benchmark.plot import draw

    workloads = (Workload(16), Workload(128))
    turns = [Turn(1.0, 0.010), Turn(1.0, 0.011), Turn(100.0, 1.0), Turn(100.0, 1.0), Turn(1.0, 0.011)]
    figures = tuple(workload_figures(turns, each) for each in workloads)
    figure = draw(Benchmark("a model", workloads, 5, 2, None, (ContenderResult("jax", figures=figures),), {}))
    assert figures[0].prefill.seconds == Spread(1.0, 1.0, 100.0)
    assert 1000 < figure.axes[1].get_ylim()[1] < 2000  # milliseconds


def test_one_workload_has_bars() -> None:
    figure = benchmark([Workload(64)], "gpt-xp numpy", "gpt-xp jax")
    assert [len(axes.patches) for axes in figure.axes] == [2, 2]
    assert not any(axes.lines for axes in figure.axes)
    assert any("64 tokens of context, batch of 1" in text for text in texts(figure))
    assert {"21.3 (21.3–21.3)", "64.0 (64.0–64.0)"} <= set(texts(figure))  # with quartiles


def test_the_floor_is_no_variant_of_a_library() -> None:
    figure = benchmark([Workload(64)], "gpt-xp numpy", "gpt-xp numpy+int8", "floor")
    assert [patch.get_hatch() for patch in figure.axes[0].patches] == [None, "//", None]


def test_powers_of_two_are_at_equal_distances_and_other_numbers_are_not() -> None:
    figure = benchmark([Workload(64, batch) for batch in (1, 2, 8)], "gpt-xp numpy")
    assert figure.axes[0].get_xscale() == "log"
    figure = benchmark([Workload(64, batch) for batch in (1, 3, 5)], "gpt-xp numpy")
    assert (figure.axes[0].get_xscale(), ticks(figure.axes[0].xaxis)) == ("linear", ["1", "3", "5"])


def test_numbers_of_ticks_do_not_cover_each_other() -> None:
    axes = benchmark([Workload(context) for context in (16, 40, 128, 256, 930, 960)], "gpt-xp numpy").axes[0]
    assert list(axes.get_xticks()) == [16, 40, 128, 256, 930, 960]
    assert ticks(axes.xaxis) == ["16", "", "128", "256", "", "960"]


@pytest.mark.parametrize("batches", [(1,), (1, 2)])
def test_where_nothing_was_measured_the_figure_says_so(batches: tuple[int, ...]) -> None:
    from gpt_xp.benchmark.plot import draw

    workloads = tuple(Workload(16, batch) for batch in batches)
    failed = (ContenderResult("jax", skipped="not installed"),)
    figure = draw(Benchmark("a model", workloads, 7, 2, None, failed, {}))
    assert "nothing could be measured" in texts(figure)


def test_without_decode_there_is_no_panel_of_it() -> None:
    from gpt_xp.benchmark.plot import draw

    workloads = (Workload(16, n_new=1), Workload(32, n_new=1))
    figures = tuple(workload_figures([Turn(0.1, None)], each) for each in workloads)
    figure = draw(Benchmark("a model", workloads, 7, 2, None, (ContenderResult("jax", figures=figures),), {}))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["prefill: ms (lower is better)"]
    workloads = (Workload(16, 1, n_new=1), Workload(16, 2, n_new=1))
    figure = draw(Benchmark("a model", workloads, 7, 2, None, (ContenderResult("jax", figures=figures),), {}))
    [axes] = figure.axes
    assert axes.get_title(loc="left") == "prefill: tokens per second (higher is better)"
    assert list(line(axes, "jax").get_ydata()) == pytest.approx([160, 320])


# --- train ------------------------------------------------------------------------------------------------------------


def evaluation(step: int, train: float | None, val: float) -> Evaluation:
    fields = dict.fromkeys(Evaluation.__dataclass_fields__)
    return Evaluation(**fields | {"step": step, "train_loss": train, "val_loss": val})  # type: ignore[arg-type]


def test_the_losses_say_which_is_best() -> None:
    from gpt_xp.training.plot import draw

    figure = draw([evaluation(0, None, 5.0), evaluation(50, 4.0, 4.5), evaluation(100, 3.0, 4.75)])
    axes = figure.axes[0]
    assert "loss, nats per token (lower is better)" in texts(figure)
    assert list(line(axes, "validation").get_ydata()) == [5.0, 4.5, 4.75]
    assert list(line(axes, "training").get_ydata()) == [4.0, 3.0]
    assert list(line(axes, "best: 4.5000 at step 50").get_xdata()) == [50]
    assert [text.get_text() for text in axes.texts] == ["3.00  training", "4.75  validation"]
    assert line(axes, "training").get_linestyle() != line(axes, "validation").get_linestyle()


def test_no_loss_has_the_color_of_a_library() -> None:
    from gpt_xp.reporting.plots import COLORS, OTHER_COLORS
    from gpt_xp.training.plot import draw

    axes = draw([evaluation(0, None, 5.0), evaluation(50, 4.0, 4.5)]).axes[0]
    libraries = {color for name, color in COLORS.items() if name != "floor"} | set(OTHER_COLORS)
    assert not libraries & {each.get_color() for each in axes.lines}


def test_one_evaluation_can_be_seen() -> None:
    from gpt_xp.training.plot import draw

    figure = draw([evaluation(3, None, 4.2)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert line(axes, "validation").get_marker() == "o"
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [3]
