"""Single checks, made in this process."""

from pathlib import Path

from gpt_xp.conformance.checks import Checks

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
