"""Traced arrays on plain NumPy: the numbers of eager ones, each computed once, and none spoiled that is still read."""

import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from cuda_by_numpy import evaluate
from gpt_xp_backends import tracing
from gpt_xp_backends.captured_step import TracedCache
from gpt_xp_backends.numpy_backend import namespace
from gpt_xp_backends.programs import Operation, Program
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer
from hypothesis import given, settings
from small_models import CONFIGS, small_params, small_tokens, tree_map
from traced_programs import INSTRUCTIONS, Instructions, Spiteful, check, planted, random_instructions

from gpt_xp import transformer as model
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.tolerances import TOLERANCE

PLAIN = namespace()
DTYPES = ("float32", "float64")


class Counting(Tracer):
    """`programs` has what was computed, and `noted` how many functions were asked for."""

    def __init__(self) -> None:
        self.spiteful, self.noted = Spiteful(), 0
        self.programs = self.spiteful.programs
        super().__init__(PLAIN, Calls(product, self.spiteful))

    def expression(self, *args: Any, **kwargs: Any) -> TracedArray:
        self.noted += 1
        return super().expression(*args, **kwargs)

    exp, sqrt = functools.partialmethod(expression, "exp"), functools.partialmethod(expression, "sqrt")
    tanh = functools.partialmethod(expression, "tanh")

    @property
    def computed_operations(self) -> int:
        return sum(len(program.operations) for program in self.programs)


def product(x: Any, w: Any, scale: float) -> Any:
    return np.matmul(x / scale, w)


def assert_same(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, dtype)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE["same", dtype], f"off by {error}"


def array(*shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.RandomState(sum(shape)).standard_normal(shape).astype(dtype)


def traced(xp: Tracer, *shape: int, dtype: str = "float64") -> TracedArray:
    return xp.matmul(array(*shape, dtype=dtype), np.eye(shape[-1], dtype=dtype))


# The model.


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_the_model_are_one_program_each(dtype: str) -> None:
    x, g, b = array(5, 7, dtype=dtype), array(7, dtype=dtype), array(11, 7, dtype=dtype)[3]
    for function, n_operations in (
        (model.gelu, 9),
        (model.softmax, 5),
        (functools.partial(model.layer_norm, g=g, b=b), 11),
    ):
        xp = Counting()
        found = xp.computed(function(traced(xp, 5, 7, dtype=dtype), xp=xp))
        assert_same(found, function(x.astype(np.float64), xp=PLAIN), dtype)
        assert [len(program.operations) for program in xp.programs] == [n_operations]
        assert xp.spiteful.n_spoiled == 1, "the product is nobody's"


def run_gpt2(xp: Any, dtype: str, name: str, cached: bool) -> np.ndarray:
    config, params = CONFIGS[name], tree_map(lambda leaf: leaf.astype(dtype), small_params(name))
    tokens = small_tokens(name, 2)[:, :13]
    if not cached:
        return model.gpt2(params, tokens, config, xp=xp)
    cache = new_cache(config, params["wpe"], 13, np.asarray([0, 3], dtype=np.int32), PLAIN)
    kind = TracedCache if isinstance(xp, Tracer) else KVCache
    pieces = []
    for first, last in ((0, 7), (7, 12), (12, 13)):
        logits, cache = model.gpt2_with_cache(params, tokens[:, first:last], config, kind(*cache), xp)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)[:, 3:]  # before that there is padding


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["prime", "planted", "sharp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_is_the_same_and_computes_each_value_once(dtype: str, name: str, cached: bool) -> None:
    xp = Counting()
    assert_same(run_gpt2(xp, dtype, name, cached), run_gpt2(PLAIN, dtype, name, cached), dtype)
    n_passes, n_layer = 3 if cached else 1, CONFIGS[name].n_layer
    assert xp.computed_operations == xp.noted - n_passes * n_layer, "the scale of attention is the product's"
    # In each layer: norm, shift of q, k, v, softmax, norm, and GELU; and the last norm. Stored besides are
    # the residual, and what `model` still has a name for: what attention adds to the residual.
    outputs = [1, 1, 1, 3, 1] + [2, 1, 1, 3, 1] * (n_layer - 1) + [1]
    assert [len(program.outputs) for program in xp.programs] == outputs * n_passes


# What is stored, what is computed again, and what may be written over.


def test_what_is_held_is_stored_on_the_way_and_what_is_dropped_is_not() -> None:
    xp = Counting()
    x = traced(xp, 5, 7)
    held = x + 1
    dropped = held * 2
    last = xp.tanh(dropped)
    del dropped
    right = array(5, 7)
    np.testing.assert_array_equal(xp.computed(last), np.tanh((right + 1) * 2))
    [program] = xp.programs
    assert [program.operations[number - 1].function for number in program.outputs] == ["add", "tanh"]
    assert xp.computed(held) is xp.computed(held)
    assert xp.computed(last) is xp.computed(last)
    assert len(xp.programs) == 1
    np.testing.assert_array_equal(xp.computed(held * 3), (right + 1) * 3)
    assert [operation.function for operation in xp.programs[1].operations] == ["multiply"]


@settings(max_examples=300, deadline=None)
@given(INSTRUCTIONS)
def test_nothing_is_spoiled_that_anybody_reads(instructions: Instructions) -> None:
    check(instructions, Spiteful())


BUGS = {
    "what is held": ("return not node.is_referenced() and uses", "return uses"),
    "what another expression reads": ("uses[id(node)] == node.n_uses", "True"),
    "uses are not counted": ("each.n_uses += 1", "each.n_uses = 1"),
    "what an operation computed again reads": ("if not all(is_done(node) for", "if not all(True for"),
    "what is somebody else's": ("if node.buffer_is_private and is_done(node)", "if is_done(node)"),
    "what has escaped": ("x._node.buffer_is_private = False", "pass"),
    "operands the other way round": ('partialmethod(_after, "subtract")', 'partialmethod(_with, "subtract")'),
    "a dtype of the first": ("np.result_type(*(node.dtype for node in arrays))", "arrays[0].dtype"),
    "a shape of the first": ("np.broadcast_shapes(*(node.shape for node in arrays))", "arrays[0].shape"),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_a_planted_bug_is_found(bug: str | None) -> None:
    wrong, spiteful = planted(*BUGS[bug]) if bug else tracing, Spiteful()

    def check_many() -> None:
        for seed in range(100):
            check(random_instructions(seed), spiteful, wrong)

    if bug is None:
        check_many()
        assert spiteful.n_spoiled > 10, "nothing was spare, and so nothing was tested"
    else:
        with pytest.raises(AssertionError):
            check_many()


ESCAPES = {
    "computed": lambda x, xp: xp.computed(x),
    "reshape": lambda x, xp: xp.reshape(x, (7, 5)),
    "index": lambda x, xp: x[1:, :],
    "transpose": lambda x, xp: xp.permute_dims(x, (1, 0)),
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_what_has_escaped_is_never_spare(escape: str) -> None:
    xp = Counting()
    x = traced(xp, 5, 7)
    out = ESCAPES[escape](x, xp)
    before = out.copy()
    y = x + 1
    del x
    xp.computed(y)
    assert xp.spiteful.n_spoiled == 0
    np.testing.assert_array_equal(out, before)


# As an array.


def test_operators_from_both_sides() -> None:
    xp = Counting()
    x, other = array(5, 7), array(3, 1, 7)
    for function in (
        lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b,
    ):  # fmt: skip
        for right in (other, 3, 0.25, np.float64(0.75)):
            for found in (function(traced(xp, 5, 7), right), function(right, traced(xp, 5, 7))):
                assert type(found) is TracedArray
        made = traced(xp, 5, 7)
        np.testing.assert_array_equal(xp.computed(function(made, other)), function(x, other))
        np.testing.assert_array_equal(xp.computed(function(other, made)), function(other, x))
        np.testing.assert_array_equal(xp.computed(function(0.25, made)), function(0.25, x))
        np.testing.assert_array_equal(xp.computed(function(made, 3)), function(x, 3))


@pytest.mark.parametrize("function", ["max", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"axis": -1}, {"axis": 0, "keepdims": True}])
def test_other_reductions_are_plain(function: str, options: Any) -> None:
    xp = Counting()
    found = getattr(xp, function)(traced(xp, 5, 7) * 2, **options)
    assert not isinstance(found, TracedArray)
    np.testing.assert_allclose(found, getattr(np, function)(array(5, 7) * 2, **options), rtol=1e-14)


def test_dtypes() -> None:
    xp = Counting()
    x = traced(xp, 5, 7, dtype="float32")
    assert (x + 1.5).dtype == x.dtype == np.float32
    assert (x + array(7)).dtype == (array(7) + x).dtype == np.float64
    assert xp.astype(x, np.dtype("float32"), copy=False) is x
    for wide in (xp.astype(x, np.dtype("float64")), xp.astype(array(5, 7, dtype="float32"), np.dtype("float64"))):
        found = xp.computed(wide)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, array(5, 7, dtype="float32"))
    # Rounded to float32 on the way, as an eager one would be.
    narrow = xp.computed(xp.astype(x + array(7), np.dtype("float32")) * 3)
    np.testing.assert_array_equal(narrow, (array(5, 7, dtype="float32") + array(7)).astype(np.float32) * np.float32(3))


def test_arrays_without_axes() -> None:
    xp = Counting()
    x = traced(xp, 5, 7, dtype="float32") * np.float32(0.1)  # no float: of its own dtype, and a given array
    assert (x.shape, x.dtype) == ((5, 7), np.float32)
    np.testing.assert_array_equal(xp.computed(x), array(5, 7, dtype="float32") * np.float32(0.1))
    product = xp.matmul(array(7), array(7))
    np.testing.assert_allclose(xp.computed(product + 1), array(7) @ array(7) + 1)


def test_the_oracle_of_programs_is_numpy() -> None:
    program = Program(
        ((np.dtype("float32"), False),),
        (Operation("astype", (0,), np.dtype("float64"), False), Operation("sum", (1,), np.dtype("float64"), True)),
        (2, 1),
    )
    total, wide = evaluate(program, [np.asarray([[0.5, 2], [3, 4]], dtype=np.float32)])
    assert (total.tolist(), wide.dtype) == ([[2.5], [7.0]], np.float64)


def test_arrays_are_gone_when_nobody_holds_them() -> None:
    """Without Python's collector: a cycle of references would hold the largest arrays there are until it comes by."""
    made: list[Any] = []

    def matmul(x: Any, w: Any, scale: float) -> Any:
        made.append(weakref.ref(out := product(x, w, scale)))
        return out

    xp = Tracer(PLAIN, Calls(matmul, Spiteful()))
    gc.collect()
    gc.disable()
    try:
        model.gpt2(small_params("prime"), small_tokens("prime"), CONFIGS["prime"], xp=xp)
        assert len(made) > 10
        assert not any(product() is not None for product in made)
    finally:
        gc.enable()
