"""The likeliest token by CUDA kernels: what `sampling.choose` says in float64, ties, NaN and all.

On the CPU, by CUDA's compiler where it is installed, on a GPU by `pytest -m gpu`, and in a generation by NumPy.
"""

import sys
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as PLAIN  # noqa: N812
import numpy as np
import pytest
from cuda_on_cpu import Library, OnCPU, library_of
from gpt_xp_backends.cupy_backend.kernels.greedy import BLOCKS, SOURCE, THREADS, greedy, options
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from libraries import make_backend
from nvrtc import compile_for

from gpt_xp.generation.sampling import Choice, choose
from gpt_xp.tolerances import TOLERANCE

NAMES = ("likeliest_of_parts", "likeliest")
DTYPES = ("float32", "float64")


def planted(old: str, new: str) -> Callable[[str], str]:
    assert SOURCE.count(old) >= 1, old
    return lambda source: source.replace(old, new, 1)


BUGS = {
    "ties go to the highest id": planted("b.id < a.id", "b.id > a.id"),
    "ties go to the first operand": planted(" || (b.best == a.best && b.id < a.id)", ""),
    "the second is that of the winner": planted("found.second = other.best > found.second", "found.second = false"),
    "the second is the loser": planted("found.second = other.best > found.second", "found.second = true"),
    "what is not allowed": planted("is_limited && !allowed[id]", "false"),
    "what is not allowed is not in the sum": planted("logit, 1, id}", "logit, allowed[id] ? 1 : 0, id}"),
    "sums that are not scaled": planted("a.total * EXP(a.largest - largest)", "a.total"),
    "no maximum taken off": planted("found.largest = largest;", "found.largest = 0;"),
    "another row": planted("row * row_stride", "0 * row_stride"),
    "rows side by side": planted("row * row_stride", "row * n_vocab"),
    "a number beyond the last": planted("id < n_vocab;", "id <= n_vocab;"),
    "the last number left out": planted("id < n_vocab;", "id < n_vocab - 1;"),
    "the first numbers alone": planted("id += gridDim.x * 256", "id += n_vocab"),
    "half of the threads": planted("others = 128", "others = 64"),
    "no barrier": planted("shared[thread] = mine;\n    __syncthreads();", "shared[thread] = mine;"),
    "no barrier between halves": planted("        __syncthreads();\n    }", "    }"),
    "one part left out": planted("thread < n_parts", "thread < n_parts - 1"),
    "the parts of another row": planted("row * n_parts + thread", "thread"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    right = [(SOURCE, name, options(dtype)) for name in NAMES for dtype in DTYPES]
    wrong = [(change(SOURCE), name, options("float32")) for change in BUGS.values() for name in NAMES]
    return library_of(tmp_path_factory.mktemp("kernels"), right + wrong)


class Emulated(OnCPU):
    asnumpy = staticmethod(np.asarray)


SIZES = (1, 2, 255, 17_011)  # a part of a block, and several numbers for each thread
assert SIZES[-1] > BLOCKS * THREADS


def logits_of(dtype: str, n_vocab: int) -> np.ndarray:
    """Five rows of a wider array, amid NaN: any numbers, large ones, ties at both ends, ties of all, and -inf."""
    wide = np.full((5, n_vocab + 3), np.nan, dtype)
    logits = wide[:, :n_vocab]
    logits[...] = np.random.RandomState(n_vocab).standard_normal((5, n_vocab)) * 5
    logits[1] = logits[1] * 50 - 400
    logits[2, [0, n_vocab // 2, -1]] = 40
    logits[3] = 2.5
    logits[4, ::2] = -np.inf
    logits[4, -1] = 1
    return logits


def allowed_of(n_vocab: int) -> np.ndarray:
    allowed = np.arange(n_vocab) % 3 != 0
    allowed[-1] = True
    return allowed


def check(cupy: Any, logits: np.ndarray, allowed: np.ndarray | None, put: Callable[[Any], Any] = lambda x: x) -> None:
    found = greedy(cupy)(put(logits), None if allowed is None else put(allowed))
    right = choose(logits.astype(np.float64), allowed=allowed, xp=PLAIN)
    dtype = str(logits.dtype)
    assert (found.token == right.token).all(), f"off by tokens: {found.token}, not {right.token}"
    largest = np.abs(np.where(np.isfinite(logits), logits, 1)).max(axis=-1).clip(1)
    for ours, theirs in zip(found[1:], right[1:], strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
        error = np.abs(ours - theirs) / largest
        assert error.max() <= 20 * TOLERANCE["same", dtype], f"off by {error}"


def check_all(cupy: Any, dtype: str) -> None:
    for n_vocab in SIZES:
        for allowed in (None, allowed_of(n_vocab)):
            check(cupy, logits_of(dtype, n_vocab), allowed)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest(library: Library, dtype: str, backwards: bool) -> None:
    check_all(Emulated(library, backwards), dtype)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library: Library, bug: str) -> None:
    def check_both() -> None:
        for backwards in (False, True):
            check_all(Emulated(library, backwards, BUGS[bug]), "float32")

    with np.errstate(all="ignore"), pytest.raises(AssertionError, match=r"off by|wait for ever"):
        check_both()


@settings(deadline=None, max_examples=50)
@given(arrays.arrays(np.float32, (2, 19), elements=st.floats(-8, 8, width=16)), st.sets(st.integers(0, 18), min_size=1))
def test_any_logits(library: Library, logits: np.ndarray, ids: set[int]) -> None:
    allowed = np.isin(np.arange(19), list(ids))
    check(Emulated(library, backwards=False), logits, allowed)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 299])
def test_what_is_not_finite_shows(library: Library, wrong: float, place: int) -> None:
    logits = np.random.RandomState(1).standard_normal((2, 300)).astype(np.float32)
    logits[1, place] = wrong
    found = greedy(Emulated(library, backwards=False))(logits, None)
    assert np.isfinite(found.logprob).tolist() == [True, False]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cudas_compiler_takes_it(dtype: str, architecture: str) -> None:
    assert not compile_for(architecture, SOURCE, options(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_on_a_gpu(dtype: str) -> None:
    make_backend("cupy", dtype)  # or skip
    cupy = sys.modules["cupy"]
    for n_vocab in (*SIZES, 50_257):
        for allowed in (None, allowed_of(n_vocab)):
            check(cupy, logits_of(dtype, n_vocab), allowed, cupy.asarray)
    assert isinstance(greedy(cupy)(cupy.zeros((3, 5), cupy.float32), None), Choice)
