"""The CUDA kernel of thin products: compiled by CUDA's compiler where it is installed, and run on the CPU, fiber by
fiber (see `cuda_on_cpu`), and on a GPU by `pytest -m gpu`."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_numbers import TOLERANCES, numbers
from cuda_on_cpu import Library, OnCPU, library_of, to_gpu
from gpt_xp_backends.cupy_backend.kernels.products import ROWS, SOURCE, TYPES, options, thin_matmul
from gpt_xp_backends.numpy_backend import namespace
from libraries import make_backend
from nvrtc import compile_for
from small_models import CONFIGS, small_params, small_tokens, tree_map

from gpt_xp.generation.step_functions import next_token_logits
from gpt_xp.kv_cache import new_cache
from gpt_xp.tolerances import TOLERANCE

NAME = "thin_product"
ROW_COUNTS = {"float16": (1, 5), "float32": (1, 2, 16), "float64": (1, 3)}
KINDS = [(dtype, rows) for dtype, counts in ROW_COUNTS.items() for rows in counts]


def planted(old: str, new: str) -> Callable[[str], str]:
    assert SOURCE.count(old) >= 1
    return lambda source: source.replace(old, new, 1)


BUGS = {
    "no barrier after the sums": planted("__syncthreads();\n        if", "if"),
    "no barrier before the next row": planted("}\n        __syncthreads();", "}"),
    "a barrier for some": planted("if (first + column < n_out) {", "if (first + column < n_out) {\n__syncthreads();"),
    "a part left out": planted("i < n_in; i += 32", "i < n_in - 1; i += 32"),
    "a number beyond the row": planted("i < n_in;", "i <= n_in;"),
    "a column beyond the last": planted("first + lane < n_out", "first + lane <= n_out"),
    "batches in another order": planted("batch % inner * x_inner", "batch % inner * x_outer"),
    "the first row alone": planted("row * x_row", "0 * x_row"),
    "the strides of a plain weight": planted("i * w_in", "i * n_out"),
    "sums in half precision": planted("SUM sums[ROWS]", "_Float16 sums[ROWS]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    right = [(SOURCE, NAME, options(*kind)) for kind in KINDS]
    wrong = [(change(SOURCE), NAME, options("float32", 2)) for change in BUGS.values()]
    return library_of(tmp_path_factory.mktemp("kernels"), right + wrong)


def operands(dtype: str, rows: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All the products of a decode step, by name, of prime sizes."""
    x = numbers(1, (rows, 131), dtype)
    cache = numbers(2, (2, 3, 53, 13), dtype)  # [batch, n_head, n_slots, d_head], of which 41 slots are looked at
    query = numbers(3, (3, 2, rows, 13), dtype).transpose(1, 0, 2, 3)  # as permuted heads lie in memory
    return {
        "weight": (x, numbers(4, (131, 67), dtype)),
        "token table": (x, numbers(5, (67, 131), dtype).T),
        "rows apart": (numbers(6, (rows, 2, 131), dtype)[:, 1, :], numbers(7, (131, 5), dtype)),
        "keys": (query, cache[:, :, :41, :].swapaxes(-1, -2)),
        "values": (numbers(8, (2, 3, rows, 41), dtype), cache[:, :, :41, :]),
        "one column": (x[:, :7], numbers(9, (7, 1), dtype)),
        "one number": (x[:, :1], numbers(10, (1, 37), dtype)),
    }


def check(cupy: Any, x: np.ndarray, w: np.ndarray) -> None:
    product = thin_matmul(cupy)(x, w)
    expected = x.astype(np.float64) @ w.astype(np.float64)
    assert (product.shape, product.dtype) == (expected.shape, x.dtype)
    error = np.abs(product - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCES[str(x.dtype)], f"off by {error}"
    assert np.isfinite(product.base).sum() == product.size, "written beside the product"


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_products(library: Library, dtype: str, rows: int, backwards: bool) -> None:
    for x, w in operands(dtype, rows).values():
        check(OnCPU(library, backwards), x, w)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library: Library, bug: str) -> None:
    def check_all() -> None:
        for x, w in operands("float32", 2).values():
            for backwards in (False, True):
                check(OnCPU(library, backwards, BUGS[bug]), x, w)

    with pytest.raises(AssertionError, match=r"off by|wait for ever|written beside"):
        check_all()


def test_every_product_of_a_decode_step_is_a_thin_one(library: Library) -> None:
    plain, config, params = namespace(), CONFIGS["prime"], small_params("prime")
    params = tree_map(lambda leaf: leaf.astype(np.float32), params)
    by_kernel = SimpleNamespace(**vars(plain) | {"matmul": thin_matmul(OnCPU(library, backwards=False))})
    cache = new_cache(config, params["wpe"], 23, np.asarray([0, 3], dtype=np.int32), plain)
    prompt, tokens = small_tokens("prime", 2)[:, :7], small_tokens("prime", 2)[:, 7:8]
    _, cache = next_token_logits(params, prompt, cache, 7, config, plain)
    expected, _ = next_token_logits(params, tokens, cache.copy(plain), 1, config, plain)
    # The position of a graph is an array on the device.
    own = cache._replace(position=np.full((), 7, dtype=np.int32))
    logits, _ = next_token_logits(params, tokens, own, 1, config, by_kernel)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE["logits", "float32"] * np.abs(expected).max())


def test_what_is_no_thin_product_is_left_to_cupy(library: Library) -> None:
    matmul = thin_matmul(OnCPU(library, backwards=False))
    x, w = numbers(1, (3, 7), "float32"), numbers(2, (7, 5), "float32")
    others = [
        (numbers(3, (ROWS + 1, 7), "float32"), w),
        (x.astype(np.float64), w),
        (x.astype(np.int32), w.astype(np.int32)),
        (x[:, :6], w),
        (x[None], w),
        (x[None], w[None]),
        (x[None, None], np.stack([w, w])[None]),
    ]
    for a, b in others:
        with pytest.raises(NotImplementedError):
            matmul(a, b)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", TYPES)
def test_cudas_compiler_takes_it(dtype: str, architecture: str) -> None:
    for rows in (1, ROWS):
        assert not compile_for(architecture, SOURCE, options(dtype, rows))


def test_cudas_compiler_refuses_what_is_wrong() -> None:
    assert "error" in compile_for("sm_80", SOURCE.replace("SUM sum = 0;", ""), options("float32", 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_products_on_a_gpu(dtype: str, rows: int) -> None:
    make_backend("cupy", dtype)  # or skip
    cupy = sys.modules["cupy"]
    refusing = SimpleNamespace(RawKernel=cupy.RawKernel, empty=cupy.empty)  # no cuBLAS
    for x, w in operands(dtype, rows).values():
        product = thin_matmul(refusing)(to_gpu(cupy, x), to_gpu(cupy, w)).get()
        expected = x.astype(np.float64) @ w.astype(np.float64)
        assert np.abs(product - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()
