"""Many tokens on NumPy: expressions in blocks, products in parts, on threads; against plain NumPy in float64."""

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comparison import assert_values
from cuda_on_cpu import amid_nan
from gpt_xp_backends import numpy_backend, numpy_blocks
from gpt_xp_backends.fusion import Fusing
from gpt_xp_backends.numpy_blocks import Threads
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_programs import INSTRUCTIONS, Instructions, check, planted, random_instructions
from small_quantized import decode

from gpt_xp import transformer as model
from gpt_xp.quantization import QuantizedWeight, _quantized
from gpt_xp.tolerances import TOLERANCE

PLAIN = numpy_backend.namespace()
N_THREADS = (1, 2, 3)
POOLS = {n: Threads(n) for n in N_THREADS}
ORACLE = SimpleNamespace(**vars(PLAIN) | {"matmul": lambda x, _: x, "computed": lambda x: x})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_blocks, "BLOCK", 64)
    monkeypatch.setattr(numpy_blocks, "COLUMNS", 5)


def compute(n_threads: int, module: Any = numpy_blocks) -> Any:
    module.BLOCK = 64
    return functools.partial(module.compute, POOLS[n_threads])


# Expressions. A product is what it is made from, amid NaN.

Arrays = dict[str, np.ndarray]


def norm(xp: Any, a: Arrays) -> list[Any]:
    x = a["residual"] + (xp.matmul(a["x"], None) + a["bias"])
    normal = model.layer_norm(x, a["g"], a["bias"], xp=xp)
    return [xp.computed(normal), x]


CASES: dict[str, Callable[[Any, Arrays], list[Any]]] = {
    "gelu": lambda xp, a: [model.gelu(xp.matmul(a["x"], None) + a["bias"], xp)],
    "softmax": lambda xp, a: [model.softmax(xp.matmul(a["x"], None) + a["mask"], xp)],
    "norm": norm,
}


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    made = amid_nan(shape, dtype)
    made[...] = np.random.RandomState(seed).standard_normal(shape)
    return made


def arrays(shape: tuple[int, ...], dtype: str) -> Arrays:
    """The product in one piece, as it always is, and what is given by the model in any strides."""
    n = shape[-1]
    mask = numbers((shape[0], *[1] * (len(shape) - 3), *shape[-2:]), dtype, 2)  # the same for all heads
    mask[..., 0, n // 2 :] = np.finfo(np.float32).min
    return {
        "x": numbers(shape, dtype, 1), "mask": mask if len(shape) > 2 else mask[0],
        "bias": numbers((n, 3), dtype, 3)[:, 1], "g": numbers((n,), dtype, 4)[::-1],
        "residual": numbers((*shape[:-2], n, shape[-2]), dtype, 5).swapaxes(-1, -2),
    }  # fmt: skip


def intact(array: np.ndarray) -> np.ndarray:
    """A copy, amid NaN, in memory of its own."""
    made = amid_nan(array.shape, array.dtype)
    made[...] = array
    return made


def assert_guarded(array: np.ndarray) -> None:
    if array.base is not None:
        assert np.isnan(np.concatenate([array.base[:4096], array.base[-4096:]])).all(), "written beside the rows"


def run(case: str, given: Arrays, compute: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """The outputs, and what became of the product."""
    products: list[np.ndarray] = []

    def product(x: np.ndarray, _: None) -> np.ndarray:
        products.append(intact(x))
        return products[-1]

    before = {name: array.copy() for name, array in given.items()}
    xp = Fusing(PLAIN, product, compute)
    outputs = [xp.computed(each) for each in CASES[case](xp, given)]
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])
    for array in (*products, *outputs):
        assert_guarded(array)
    return outputs, products[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 7), (23, 7), (5, 131), (3, 11, 13), (2, 3, 11, 13), (2, 1, 29, 1)])
@pytest.mark.parametrize("case", CASES)
def test_expressions_of_the_model(case: str, shape: tuple[int, ...], dtype: str) -> None:
    a = arrays(shape, dtype)
    wide = {name: array.astype(np.float64) for name, array in a.items()}
    expected = CASES[case](ORACLE, wide)
    found = {n: run(case, a, compute(n)) for n in N_THREADS}
    for outputs, product in found.values():
        for out, right in zip(outputs, expected, strict=True):
            assert out.dtype == dtype
            assert_values(out, right, TOLERANCE["same", dtype])
        assert any(np.shares_memory(out, product) for out in outputs), "the product's memory was not used again"
    # Not a bit depends on whether it is.
    fresh, product = run(case, a, lambda p, arrays, shape, spare: compute(2)(p, arrays, shape, frozenset()))
    np.testing.assert_array_equal(product, a["x"])
    for out, right in zip(found[2][0], fresh, strict=True):
        np.testing.assert_array_equal(out, right)


@settings(max_examples=150, deadline=None)
@given(INSTRUCTIONS, st.sampled_from(N_THREADS))
def test_random_expressions(instructions: Instructions, n_threads: int) -> None:
    check(instructions, compute(n_threads))


BUGS = {
    "a register is free too early": ("if self._last_use[each] == number and places", "if places"),
    "a register of another kind": ("self._registers[register] == self._kind(number)", "True"),
    "a register is taken twice": ("free.remove(fits[-1])", "pass"),
    "an output over what is read later": ("if self._last_use[each] <= value and", "if"),
    "an output of another kind": ("and program.given[each] == self._kind(value)", ""),
    "two outputs over one array": ("if each not in taken and", "if"),
    "an output over a smaller array": ("and arrays[each].shape == _of(shape, is_row)]", "]"),
    "rows left out": ("slice(first, first + n)) for place", "slice(first, first + n - 1)) for place"),
    "the first heads alone": ("range, shape[:-2])", "range, [1] * len(shape[:-2]))"),
    "a number for each element": ("1 if is_row else width", "width"),
}


def with_mistake(old: str, new: str) -> Any:
    """The module with a mistake, where memory that was not written is no number."""
    module = planted(numpy_blocks, old, new)
    module.COLUMNS = 5
    module.np = SimpleNamespace(**vars(np) | {"empty": lambda shape, dtype: np.full(shape, np.nan, dtype)})
    return module


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_a_planted_bug_is_found(bug: str | None) -> None:
    module = with_mistake(*BUGS[bug]) if bug else numpy_blocks

    def check_many() -> None:
        for seed in range(100):
            check(random_instructions(seed), compute(1, module))

    if bug is None:
        check_many()
    else:
        with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError)):
            check_many()


# Products.


@pytest.mark.parametrize("n_threads", N_THREADS)
def test_products(n_threads: int) -> None:
    random = np.random.RandomState(11)
    for dtype, n_columns, batch in itertools.product(("float32", "float64"), (1, 2, 37), ((), (1,), (2, 7))):
        x = random.standard_normal((*batch, 13, 2 * 19)).astype(dtype)[..., ::2]
        w = random.standard_normal((*batch, n_columns, 19)).astype(dtype).swapaxes(-1, -2)
        found = numpy_blocks.matmul(POOLS[n_threads], None, x, w)
        assert found.dtype == dtype
        assert_values(found, x.astype(np.float64) @ w.astype(np.float64), TOLERANCE["same", dtype])
    for a, b in ((x, w[0, 0]), (x[0, 0], w), (x[0, 0, 0], w[0, 0]), (x[0, 0, 0], w[0, 0, :, 0])):
        assert_values(numpy_blocks.matmul(POOLS[n_threads], None, a, b), a @ b, TOLERANCE["same", "float64"])


def widening_by_numpy(_: QuantizedWeight) -> Callable[..., None]:
    def widen(q: np.ndarray, scale: np.ndarray, wide: np.ndarray) -> None:
        wide[:] = decode(q, scale)

    return widen


@pytest.mark.parametrize("n_threads", N_THREADS)
@pytest.mark.parametrize("n_out", [1, 2, 37])
@pytest.mark.parametrize(("kind", "n_in"), [("int8", 7), ("int8", 131), ("int4", 32), ("int4", 96)])
def test_products_with_quantized_weights(kind: str, n_in: int, n_out: int, n_threads: int) -> None:
    random = np.random.RandomState(n_in + n_out)
    weight = QuantizedWeight(*_quantized(random.standard_normal((n_out, n_in)).astype(np.float32), kind))
    meant = decode(weight.q, weight.scale.astype(np.float64)).T
    x = random.standard_normal((13, 2 * n_in)).astype(np.float32)[:, ::2]
    found = numpy_blocks.matmul(POOLS[n_threads], widening_by_numpy, x, weight)
    assert found.dtype == np.float32
    assert_values(found, x.astype(np.float64) @ meant, TOLERANCE["same", "float32"])


@pytest.mark.parametrize(
    ("old", "new"),
    [("n * (place + 1) // of", "n // of * (place + 1)"), ("range(n_tiles)", "range(1)")],
)
def test_a_planted_bug_of_products_is_found(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.setattr(numpy_blocks, "matmul", with_mistake(old, new).matmul)

    def check_both() -> None:
        test_products(2)
        test_products_with_quantized_weights("int8", 7, 37, 2)

    with pytest.raises(AssertionError, match="not finite"):
        check_both()
