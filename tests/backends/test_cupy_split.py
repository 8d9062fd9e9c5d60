"""The products that are prepared for CuPy: 16 bytes at once, and sums split over blocks. Run as those of
`test_cupy_products` are: on the CPU, by CUDA's compiler where it is installed, and by `pytest -m gpu`.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_numbers import TOLERANCES, numbers
from cuda_on_cpu import Library, OnCPU, library_of, to_gpu
from gpt_xp_backends.cupy_backend.kernels.products import (
    ROWS,
    SPLIT_SOURCE,
    TABLE_SOURCE,
    TYPES,
    split_matmul,
    split_options,
)
from libraries import make_backend
from nvrtc import assembly, compile_for

import gpt_xp

SPLIT, TABLE = (SPLIT_SOURCE, "split_product"), (TABLE_SOURCE, "table_product")
KINDS = [(dtype, rows) for dtype in TYPES for rows in (1, 3)] + [("float32", ROWS)]


def planted(kernel: tuple[str, str], old: str, new: str) -> tuple[tuple[str, str], Callable[[str], str]]:
    source = kernel[0]
    assert source.count(old) >= 1, old
    changed = source.replace(old, new, 1)
    return kernel, lambda given: changed if given == source else given


BUGS = {
    "no barrier after the sums": planted(SPLIT, "__syncthreads();\n        if", "if"),
    "no barrier before the next row": planted(SPLIT, "}\n        __syncthreads();", "}"),
    "a barrier for some": planted(SPLIT, "if (column < n_out) {", "if (column < n_out) {\n__syncthreads();"),
    "all blocks begin at the first number": planted(SPLIT, "blockIdx.y * length, end", "0, end"),
    "a part ends too late": planted(SPLIT, "min(begin + length, n_in)", "min(begin + length + 1, n_in)"),
    "a number beyond the last": planted(SPLIT, "min(begin + length, n_in)", "begin + length"),
    "all blocks store the first part": planted(SPLIT, "(long long)blockIdx.y * ROWS", "(long long)0 * ROWS"),
    "a column beyond the last": planted(SPLIT, "first + thread < n_out", "first + thread <= n_out"),
    "the first row alone": planted(SPLIT, "row * x_row", "0 * x_row"),
    "sums in half precision": planted(SPLIT, "SUM sums[ROWS]", "_Float16 sums[ROWS]"),
    "half of the lanes": planted(TABLE, "lanes = 16", "lanes = 8"),
    "every lane stores": planted(TABLE, "lane == 0 && column < n_out", "lane == 0"),
    "the last numbers left out": planted(TABLE, "i < n_in;", "i < n_in - VECTOR;"),
    "numbers beyond the last": planted(TABLE, "i < n_in;", "i <= n_in;"),
    "the first row of x alone": planted(TABLE, "row * x_row + i", "i"),
    "columns in steps of the sum": planted(TABLE, "column * w_out", "column * n_in"),
    "the table in half precision": planted(TABLE, "SUM sums[ROWS]", "_Float16 sums[ROWS]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    right = [(*kernel, split_options(*kind)) for kernel in (SPLIT, TABLE) for kind in KINDS]
    wrong = [(change(source), name, split_options("float32", 3)) for (source, name), change in BUGS.values()]
    return library_of(tmp_path_factory.mktemp("kernels"), right + wrong)


def operands(dtype: str, rows: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of 131 numbers in parts, and columns and sums of a prime number of vectors."""
    vector = 16 // np.dtype(dtype).itemsize
    x = numbers(1, (rows, 131), dtype)
    wide = numbers(2, (131, 2, 31 * vector), dtype)
    return {
        "a weight": (x, numbers(3, (131, 37 * vector), dtype)),
        "a part of a wider one": (x, wide[:, 1, :]),
        "few columns": (x, numbers(4, (131, vector), dtype)),
        "a short sum": (x[:, :5], numbers(5, (5, 37 * vector), dtype)),
        "x of another stride": (numbers(6, (131, rows), dtype).T, numbers(7, (131, 37 * vector), dtype)),
        "the token table": (numbers(8, (rows, 131 * vector), dtype), numbers(9, (67, 131 * vector), dtype).T),
        "a small table": (numbers(10, (rows, 3 * vector), dtype), numbers(11, (5, 3 * vector), dtype).T),
        "rows of a wider table": (
            numbers(12, (rows, 2, 7 * vector), dtype)[:, 1, :],
            numbers(13, (11, 3, 7 * vector), dtype)[:, 1, :].T,
        ),
    }


def check(cupy: Any, x: np.ndarray, w: np.ndarray) -> None:
    product = split_matmul(cupy)(x, w)
    parts = product if isinstance(product, list) else [product]
    expected = x.astype(np.float64) @ w.astype(np.float64)
    wide = "float64" if x.dtype == np.float64 else "float32"
    for part in parts:
        assert (part.shape, part.dtype) == (expected.shape, wide if isinstance(product, list) else x.dtype)
    whole = parts[0].base
    assert np.isfinite(whole).sum() == len(parts) * expected.size, "written beside the product"
    error = np.abs(np.sum(parts, axis=0, dtype=np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCES[str(x.dtype)], f"off by {error}"


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_products(library: Library, dtype: str, rows: int, backwards: bool) -> None:
    for x, w in operands(dtype, rows).values():
        check(OnCPU(library, backwards), x, w)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library: Library, bug: str) -> None:
    def check_all() -> None:
        for x, w in operands("float32", 3).values():
            for backwards in (False, True):
                check(OnCPU(library, backwards, BUGS[bug][1]), x, w)

    with pytest.raises(AssertionError, match=r"off by|wait for ever|written beside"):
        check_all()


class Launches:
    """Stands in for CuPy without computing. `blocks` has the number of blocks of each launch, by the kernel's name."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[int]] = {}
        self.empty = np.empty

    def RawKernel(self, source: str, name: str, options: tuple[str, ...]) -> Any:  # noqa: N802, CuPy's name
        return lambda grid, block, arguments: self.blocks.setdefault(name, []).append(grid[0] * grid[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", ["124M", "1558M"])
def test_every_multiprocessor_of_an_h100_has_two_blocks_of_every_product(size: str, dtype: str) -> None:
    config, launches = gpt_xp.SIZES[size], Launches()
    n = config.n_embd
    matmul = split_matmul(launches)
    for n_in, n_out in ((n, 3 * n), (n, n), (n, 4 * n), (4 * n, n)):
        matmul(np.empty((1, n_in), dtype), np.empty((n_in, n_out), dtype))
    matmul(np.empty((1, n), dtype), np.empty((config.n_vocab, n), dtype).T)
    assert {name: len(blocks) for name, blocks in launches.blocks.items()} == {"split_product": 4, "table_product": 1}
    assert min(each for blocks in launches.blocks.values() for each in blocks) >= 2 * 132


def test_what_is_not_aligned_or_no_plain_matrix_is_left_to_the_other_kernel() -> None:
    launches = Launches()
    x, w = np.empty((2, 8), np.float32), np.empty((8, 12), np.float32)
    cases = [
        (x, np.empty((8, 11), np.float32)),  # 11 numbers are no whole vectors
        (x, np.empty((8, 13), np.float32)[:, :12]),
        (x, np.empty((8, 13), np.float32)[:, 1:]),
        (x, np.empty((8, 24), np.float32)[:, ::2]),
        (x[:, :7], np.empty((11, 7), np.float32).T),
        (x, np.empty((11, 9), np.float32)[:, 1:].T),
        (np.empty((8, 2), np.float32).T, np.empty((11, 8), np.float32).T),
        (x[None, None], w[None, None]),
    ]
    matmul = split_matmul(SimpleNamespace(RawKernel=launches.RawKernel, empty=np.empty))
    for a, b in cases:
        matmul(a, b)
    assert list(launches.blocks) == ["thin_product"]
    refused = [(np.empty((ROWS + 1, 8), np.float32), w), (x.astype(np.float64), w), (x[:, :6], w)]
    matmul = split_matmul(SimpleNamespace(RawKernel=launches.RawKernel, matmul=lambda a, b: "cuBLAS"))
    assert [matmul(a, b) for a, b in refused] == ["cuBLAS"] * 3


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", TYPES)
def test_cudas_compiler_takes_it(dtype: str, architecture: str) -> None:
    for source, _ in (SPLIT, TABLE):
        for rows in (1, ROWS):
            assert not compile_for(architecture, source, split_options(dtype, rows))


@pytest.mark.parametrize(("source", "name"), [SPLIT, TABLE])
def test_cudas_compiler_reads_16_bytes_at_once(source: str, name: str) -> None:
    assert "ld.global.v4.u32" in assembly(source, split_options("float16", 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_products_on_a_gpu(dtype: str, rows: int) -> None:
    make_backend("cupy", dtype)  # or skip
    cupy = sys.modules["cupy"]
    refusing = SimpleNamespace(RawKernel=cupy.RawKernel, empty=cupy.empty)  # no cuBLAS
    for x, w in operands(dtype, rows).values():
        product = split_matmul(refusing)(to_gpu(cupy, x), to_gpu(cupy, w))
        total = sum(part.get().astype(np.float64) for part in (product if isinstance(product, list) else [product]))
        expected = x.astype(np.float64) @ w.astype(np.float64)
        assert np.abs(total - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()
