"""`gpt-xp conform`: right libraries pass, and each planted mistake is found at its place.

The wrong libraries are array-api-strict with one change, as modules that Python can import.
"""

import json
import math
import os
from pathlib import Path

import pytest
from commands import posix
from libraries import skipping_what_is_missing

import gpt_xp
from gpt_xp.comparison.job import PROMPTS
from gpt_xp.conformance import report, run
from gpt_xp.conformance.functions import FUNCTIONS
from gpt_xp.conformance.results import Check, Conformance
from gpt_xp.conformance.run import check_names, conform
from gpt_xp.errors import BackendError, ModelNotFoundError, SettingError

pytestmark = pytest.mark.slow  # Most tests run a whole model in a process of its own.
LAYERS = ["embedding", *(f"block {layer}" for layer in range(6)), "ln_f", "logits"]

# What each wrong library changes.
WITHOUT_TAKE = "del take"
WITHOUT_TAKE_ALONG_AXIS = "del take_along_axis"
MEAN_IGNORES_KEEPDIMS = """
import array_api_strict
def mean(x, /, *, axis=None, keepdims=False): return array_api_strict.mean(x, axis=axis)
"""
TANH_IS_OFF = """
import array_api_strict
def tanh(x, /): return array_api_strict.tanh(x) * 1.001
"""
MATMUL_RAISES = """
def matmul(a, b, /): raise RuntimeError("no kernel for this product")
"""
SORT_HANGS = """
import time
def sort(x, /, **options): time.sleep(100_000)
"""
SORT_CRASHES = """
import os, signal
def sort(x, /, **options): os.kill(os.getpid(), signal.SIGSEGV)
"""
SORT_EXITS = """
import os, sys
def sort(x, /, **options):
    print("the driver is gone", file=sys.stderr, flush=True)
    os._exit(3)
"""
JITS = """
import numpy as np
def good_jit(function): return function
def jit_that_asks_for_numbers(function):
    def call(*arrays):
        function(*arrays)
        raise TypeError("this array has no number while it is traced")
    return call
def jit_that_keeps_the_first_result(function):
    kept = []
    def call(*arrays):
        kept.append(function(*arrays))
        return kept[0]
    return call
def jit_with_abstract_arrays(function):
    class Abstract:
        def __init__(self, array): self.dtype, self.shape, self.device = array.dtype, array.shape, array.device
    return lambda *arrays: function(*map(Abstract, arrays))
"""


def check(found: Conformance, name: str) -> Check:
    return next(each for each in found.checks if each.name == name)


def wrong(found: Conformance) -> list[str]:
    return [each.name for each in found.checks if each.is_ok is False]


def not_made(found: Conformance) -> list[str]:
    return [each.name for each in found.checks if each.is_ok is None]


# --- right libraries --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numpy_found() -> Conformance:
    return conform("numpy")


def test_numpy_is_inside_the_tolerance_by_the_figures_of_compare(numpy_found):
    assert numpy_found.is_ok, report.as_text(numpy_found)
    assert numpy_found.used == "its adapter's namespace"
    [theirs] = gpt_xp.compare("numpy", "shakespeare", list(PROMPTS[:2]), max_tokens=1).runs
    assert theirs.figures is not None
    layers = [(layer.name, layer.difference.relative, layer.allowed) for layer in theirs.figures.layers]
    *mine, logits = numpy_found.of("layer")
    assert [(each.name, pytest.approx(each.relative), each.allowed) for each in mine] == layers
    assert logits.relative == pytest.approx(theirs.figures.logits.difference.relative)
    text = check(numpy_found, "text").figures
    assert text["token_ids"] == gpt_xp.load("shakespeare").generate(PROMPTS[0], max_tokens=16).token_ids
    assert check(numpy_found, "speed").figures["tokens_per_second"] > 0


def test_a_bare_namespace_needs_no_adapter(library):
    name = library(JITS)
    found = conform(name, jit=f"{name}.good_jit")
    assert found.is_ok, report.as_text(found)
    assert (found.version, found.used) == ("0.1", "as it is; to NumPy by __array__")
    assert [each.name for each in found.checks] == check_names(name, jit="some.jit")
    assert "planted_library: inside the tolerance" in report.as_text(found)


def test_the_namespace_is_that_of_array_api_compat_where_it_has_one():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert torch
    from gpt_xp.conformance.adapter import NamespaceBackend

    backend = NamespaceBackend("torch")
    assert (backend.used, backend.xp.__name__) == ("through array-api-compat", "array_api_compat.torch")


def test_a_lazy_library_computes_after_each_step(library):
    library("")
    found = conform("lazy_namespace")
    assert found.is_ok, report.as_text(found)


# --- planted mistakes -------------------------------------------------------------------------------------------------


def test_a_missing_function_is_named_with_what_it_costs(library):
    found = conform(library(WITHOUT_TAKE))
    assert wrong(found) == ["take", "forward pass"]
    take, forward = check(found, "take"), check(found, "forward pass")
    assert take.message == "xp.take(x, tokens, axis=0): it is missing"
    assert take.needed_for == ("forward pass",)
    assert forward.line is not None
    assert (forward.line.file, forward.line.function) == ("transformer.py", "embed")
    assert "AttributeError" in forward.message
    # The rest is told with NumPy in its place, except what would tell nothing about the library.
    assert found.replaced == ("take",)
    assert not_made(found) == ["speed"]
    assert all(each.is_ok for each in found.of("layer"))
    assert check(found, "text").figures["shared"] == 16


def test_a_function_that_only_the_loss_needs_costs_only_the_loss(library):
    found = conform(library(WITHOUT_TAKE_ALONG_AXIS))
    assert wrong(found) == ["take_along_axis", "loss", "sampling"]
    assert check(found, "take_along_axis").needed_for == ("loss", "sampling")
    assert not not_made(found)
    assert "(needed for: loss, sampling)" in report.as_text(found).replace("\n  ", " ")


def test_a_function_that_ignores_an_argument_is_caught_by_its_shape(library):
    found = conform(library(MEAN_IGNORES_KEEPDIMS))
    assert check(found, "mean").message == (
        "xp.mean(x, axis=-1, keepdims=True): it returned float32 [6], and float32 [6, 1] was expected"
    )
    line = check(found, "forward pass").line
    assert line is not None
    assert line.code == "centered = wide - xp.mean(wide, axis=-1, keepdims=True)"
    assert line.arrays == "wide float32 [20, 192]"


def test_wrong_numbers_are_caught_and_the_first_layer_is_named(library):
    found = conform(library(TANH_IS_OFF))
    assert "it differs by 1.0e-03 of the largest number (allowed: 2e-06)" in check(found, "tanh").message
    layers = found.of("layer")
    assert [each.name for each in layers] == LAYERS
    assert layers[0].is_ok
    assert next(each.name for each in layers if not each.is_ok) == "block 0"
    assert not found.replaced


def test_the_line_that_raises_is_told_with_its_arrays(library):
    found = conform(library(MATMUL_RAISES))
    forward = check(found, "forward pass")
    assert forward.message == "RuntimeError: no kernel for this product"
    assert forward.line is not None
    source = (Path(gpt_xp.__file__).parent / "transformer.py").read_text().splitlines()
    assert forward.line.code == source[forward.line.number - 1].strip() == "return xp.matmul(x, w) + b"
    assert forward.line.arrays == "x float32 [20, 192], w float32 [192, 576], b float32 [576]"


def test_an_error_of_a_lazy_library_is_told_at_the_line_that_caused_it(library, monkeypatch):
    library("")
    monkeypatch.setenv("LAZY_FAILS", "tanh")
    found = conform("lazy_namespace")
    forward = check(found, "forward pass")
    assert forward.line is not None
    assert forward.line.function == "gelu"
    assert forward.message == "RuntimeError: this kernel does not exist"
    assert check(found, "text").is_ok  # with NumPy's tanh


def test_a_library_that_hangs_is_ended_and_the_checks_go_on(library, monkeypatch):
    monkeypatch.setattr(run, "FUNCTIONS", {name: FUNCTIONS[name] for name in ("sort", "where")})
    monkeypatch.setattr(run, "PROGRAMS", ("forward pass", "cache"))
    found = conform(library(SORT_HANGS), timeout=10)
    assert wrong(found) == ["sort"]
    assert check(found, "sort").message == "it took longer than 10 s, and its process was ended"
    assert check(found, "where").is_ok


@posix
def test_a_library_that_kills_its_process_is_told_with_its_signal(library):
    found = conform(library(SORT_CRASHES))
    assert wrong(found) == ["sort", "sampling"]
    assert check(found, "sort").message == "its process crashed: SIGSEGV"


def test_a_library_that_ends_its_process_is_told_with_its_last_words(library):
    found = conform(library(SORT_EXITS))
    assert check(found, "sampling").message == "its process ended with exit code 3 (the driver is gone)"
    assert check(found, "speed").is_ok


@pytest.mark.parametrize(
    ("jit", "message", "code"),
    [
        ("jit_that_asks_for_numbers", "TypeError: this array has no number while it is traced", None),
        ("jit_that_keeps_the_first_result", "the traced forward pass differs from the plain one", None),
        ("jit_with_abstract_arrays", "AttributeError", "x = embed("),
    ],
)
def test_a_compiler_that_cannot_trace_is_told(library, monkeypatch, jit, message, code):
    name = library(JITS)
    monkeypatch.setattr(run, "FUNCTIONS", {})
    found = conform(name, jit=f"{name}.{jit}")
    assert wrong(found) == ["jit"]
    assert message in check(found, "jit").message
    line = check(found, "jit").line
    assert (line is None) == (code is None)


def test_jax_can_be_traced():
    with skipping_what_is_missing("jax"):
        import jax  # noqa: F401
    found = conform("jax.numpy", jit="jax.jit")
    assert found.is_ok, report.as_text(found)


# --- what cannot be checked -------------------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_said_before_anything_runs(library, monkeypatch):
    monkeypatch.setattr(run, "LibraryProcess", None)
    for arguments, error, message in (
        ({"module": "no_such_library.core"}, BackendError, "there is no module 'no_such_library.core' here"),
        ({"module": "numpy", "timeout": 0}, SettingError, "timeout must be more than 0 and at most"),
        ({"module": "numpy", "model": "no-such-model"}, ModelNotFoundError, "no-such-model"),
    ):
        with pytest.raises(error, match=message):
            conform(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del asarray", "it cannot take arrays from NumPy"),
        ("raise RuntimeError('no driver')", "planted_library cannot be imported: RuntimeError: no driver"),
        ("def asarray(x): return object()", "cannot be read by NumPy"),
    ],
)
def test_a_library_that_cannot_be_loaded_has_a_problem(library, change, message):
    found = conform(library(change))
    assert found.problem is not None
    assert message in found.problem
    assert not found.is_ok
    assert not found.checks
    assert "FAILED" in report.as_text(found)
    assert report.as_markdown([found]).splitlines()[2].startswith("| `planted_library` | - | - |")


def test_a_function_that_does_not_exist_cannot_trace(library):
    found = conform(library(""), jit="planted_library.no_jit")
    assert found.problem is not None
    assert "there is no function 'planted_library.no_jit'" in found.problem


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_fits_a_terminal_and_json_has_only_numbers(numpy_found):
    assert max(map(len, report.as_text(numpy_found).splitlines())) <= 80
    record = numpy_found.as_dict()
    assert record["is_ok"]
    json.dumps(record, allow_nan=False)
    names = {"module", "model", "version", "used", "device", "problem", "replaced", "checks", "is_ok"}
    assert set(record) == names
    fields = {"name", "kind", "is_ok", "message", "needed_for", "line", "relative", "allowed", "figures"}
    assert all(set(each) == fields for each in record["checks"])


def test_an_infinite_error_is_shown_and_is_null_in_json():
    bad = Check("logits", "layer", False, "bad", relative=math.inf, allowed=1e-5, figures={"computed": True})
    found = Conformance("m", "shakespeare", checks=(bad,))
    assert "not finite" in report.as_text(found)
    assert found.as_dict()["checks"][0]["relative"] is None


def test_a_row_of_markdown_has_a_cell_for_each_head(numpy_found):
    head, line, row = report.as_markdown([numpy_found]).splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    assert row.startswith("| `numpy` | ")
    assert "| 32 of 32 | all |" in row
    assert "16 of 16 tokens" in row
    assert os.linesep not in row
