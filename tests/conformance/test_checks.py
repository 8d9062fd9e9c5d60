"""Single checks, made in this process."""

from pathlib import Path

import pytest

from gpt_xp.comparison import worker
from gpt_xp.conformance import checks as checks_module
from gpt_xp.conformance.checks import Checks
from gpt_xp.hub.find import find_model

EXP_IS_0_BELOW_MINUS_7 = """
import array_api_strict as strict
def exp(x, /): return strict.where(x < -7, strict.asarray(0, dtype=x.dtype), strict.exp(x))
"""
FULL_IS_WIDE = """
import array_api_strict
def full(shape, value, *, dtype=None, device=None):
    return array_api_strict.full(shape, value, dtype=array_api_strict.float64 if shape == () else dtype)
"""
MEAN_IS_A_FLOAT = """
import array_api_strict
def mean(x, /, *, axis=None, keepdims=False):
    found = array_api_strict.mean(x, axis=axis, keepdims=keepdims)
    return float(found) if found.shape == () else found
"""


def test_an_exp_that_is_0_too_early_is_caught(checks_of):
    """Most exponentials of a softmax are small."""
    assert checks_of(EXP_IS_0_BELOW_MINUS_7).function("exp").is_ok is False


def test_the_dtype_of_an_array_without_axes_is_checked(checks_of):
    found = checks_of(FULL_IS_WIDE).function("full")
    assert found.is_ok is False
    assert found.message == (
        "xp.full((), -1.5, dtype=x.dtype, device=device): it returned float64 [], and float32 [] was expected"
    )


def test_a_python_scalar_has_no_dtype_to_check(checks_of):
    assert checks_of(MEAN_IS_A_FLOAT).function("mean").is_ok


def test_sampling_needs_no_model():
    assert Checks("numpy", Path("no-model"), None, []).program("sampling").is_ok


@pytest.mark.parametrize(
    ("fails", "program", "file", "function", "code"),
    [
        ("concat", "cache", "kv_cache.py", "longer", "return xp.concat([x, more], axis=-2)"),
        ("cumulative_sum", "sampling", "sampling.py", "keep_likeliest", "needed = xp.cumulative_sum("),
    ],
)
def test_a_lazy_library_gets_the_line_of_the_function_that_fails(
    library, monkeypatch, fails, program, file, function, code
):
    library("")
    monkeypatch.setenv("LAZY_FAILS", fails)
    found = Checks("lazy_namespace", find_model("shakespeare"), None, []).program(program)
    assert found.message == "RuntimeError: this kernel does not exist"
    assert found.line is not None
    assert (found.line.file, found.line.function) == (file, function)
    assert found.line.code.startswith(code)


def test_the_trace_without_a_cache_is_that_with_one_from_one_forward_pass(monkeypatch):
    checks = Checks("numpy", find_model("shakespeare"), None, [])
    calls = []
    original = checks.reference.backend.xp.take
    ids = checks.prompts[1]
    wanted = worker.trace(checks.reference, ids)

    def take(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(checks.reference.backend.xp, "take", take)
    found = checks_module._trace_without_cache(checks.reference, ids)
    assert len(calls) == 2  # It takes tokens once, and positions once.
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)
