"""The NumPy backend: the logits of the naive model for any number of rows, and unchanged settings of the process."""

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from commands import in_a_new_process
from comparison import assert_values
from gpt_xp_backends import numpy_backend
from libraries import quantized, skipping_what_is_missing
from naive_gpt2 import gpt2 as naive_gpt2
from small_models import CONFIGS, small_params, small_tokens, tree_map
from small_quantized import KINDS, float64_of, small

import gpt_xp
from gpt_xp import Model, transformer
from gpt_xp.errors import PromptError
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE

PLAIN = numpy_backend.namespace()
IN_BLOCKS = get_backend("numpy").xp
ROWS = (1, 2, 3, 5, 7, 8, 12)


def make(kind: str | None = None, **settings: Any) -> Model:
    """Return a small model in float32 or float64, or with quantized weights."""
    backend = get_backend("numpy", **settings)
    if kind:
        params, config = small(kind)
        return Model(params, config, backend=quantized(backend))
    params = tree_map(lambda leaf: leaf.astype(backend.dtype), small_params("prime"))
    return Model(params, CONFIGS["prime"], backend=backend)


def naive(model: Model) -> Callable[[Any], "np.ndarray[Any, Any]"]:
    """Return the naive model in float64, a function of tokens [n_seq] to logits [n_seq, n_vocab]."""
    return functools.partial(naive_gpt2, **float64_of(model.params), n_head=model.config.n_head)


def blas_threads() -> int:
    """Return the number of threads of NumPy's BLAS."""
    found = [each for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]
    bundled = [each for each in found if "numpy.libs" in each["filepath"]]  # SciPy, which Numba imports, has its own
    return max(each["num_threads"] for each in bundled or found)


# Any number of rows.


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits, so that small models reach every way to compute products, attention and GELU."""
    for name, value in {"PART_COLUMNS": 5, "QUERIES": 3, "MAX_SCORES": 64, "MAX_GELU_NUMBERS": 500}.items():
        monkeypatch.setattr(numpy_backend, name, value)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("rows", [*ROWS, 13])  # 13 x 11 rows of a quantized product are multiplied by BLAS
def test_logits_of_a_batch_are_those_of_the_naive_model(small_blocks: None, kind: str | None, rows: int) -> None:
    model = make(kind)
    tokens, expected_of = small_tokens("prime", 13)[13 - rows :, :11], naive(model)
    for found, row in zip(model.logits(tokens), tokens, strict=True):
        assert_values(found, expected_of(row), TOLERANCE["logits", "float32"])


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("rows", ROWS)
def test_each_step_of_a_batch_has_the_logits_of_each_row_alone(small_blocks: None, kind: str | None, rows: int) -> None:
    model = make(kind)
    prompts = [small_tokens("prime", 12)[row][: 1 + row % 4].tolist() for row in range(rows)]

    def steps(prompts: list[list[int]]) -> "np.ndarray[Any, Any]":
        logits, cache = model._decoder.prefill(prompts)
        found = [logits]
        for token in range(6):
            logits, cache = model._decoder.decode([token] * len(prompts), cache)
            found.append(logits)
        return np.stack(found)  # [steps, rows, n_vocab]

    together, expected_of = steps(prompts), naive(model)
    for row, prompt in enumerate(prompts):
        alone = np.concatenate([prompt, range(6)])
        expected = expected_of(alone)[len(prompt) - 1 :]
        assert_values(together[:, row], expected, TOLERANCE["logits", "float32"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [*ROWS, 29, 32, 33])
def test_products_of_several_rows(monkeypatch: pytest.MonkeyPatch, rows: int, transposed: bool) -> None:
    monkeypatch.setattr(numpy_backend, "PART_COLUMNS", 5)
    multiplied: list[int] = []
    original = np.matmul

    def spy(x: Any, w: Any, **options: Any) -> Any:
        multiplied.append(w.shape[-1])
        return original(x, w, **options)

    monkeypatch.setattr(np, "matmul", spy)
    random = np.random.RandomState(rows)
    x = random.standard_normal((rows, 7)).astype(np.float32)
    w = random.standard_normal((13, 7)).astype(np.float32).T
    w = w if transposed else np.ascontiguousarray(w)
    product = numpy_backend.namespace().matmul(x, w)
    expected = np.einsum("ij,jk->ik", x.astype(np.float64), w.astype(np.float64))
    assert (product.shape, product.dtype) == (expected.shape, np.float32)
    assert_values(product, expected, TOLERANCE["same", "float32"])
    assert multiplied == ([5, 5, 3] if transposed and 3 < rows < 33 else [13])


# Attention and GELU, in blocks.


@pytest.mark.parametrize("scores", [1, 2 * 3 * 13, 3 * 2 * 3 * 13, 2**18])
@pytest.mark.parametrize("mask_shape", [(11, 13), (2, 1, 11, 13), (2, 7, 11, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_blocks_is_attention(
    monkeypatch: pytest.MonkeyPatch, causal: bool, mask_shape: tuple[int, ...], scores: int
) -> None:
    monkeypatch.setattr(numpy_backend, "MAX_SCORES", scores)
    monkeypatch.setattr(numpy_backend, "QUERIES", 3)
    random = np.random.RandomState(scores % 97)
    q, k, v = (random.standard_normal((2, 7, n, d)).astype(np.float32) for n, d in ((11, 5), (13, 5), (13, 3)))
    visible = random.standard_normal(mask_shape) > 0
    visible[..., 0] = True
    visible &= not causal or np.tri(11, 13, dtype=np.bool_)
    mask = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    # Other shapes are computed at once: one head for all, and no heads.
    first = (q[0, 0], k[0, 0], v[0, 0], mask.reshape(-1, 11, 13)[0])
    for arrays in ((q, k, v, mask), (q, k[:, :1], v[:, :1], mask), first):
        expected = transformer.attention(*[array.astype(np.float64) for array in arrays], PLAIN)
        found = transformer.attention(*arrays, IN_BLOCKS)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert_values(found, expected, TOLERANCE["same", "float32"])


def test_a_query_that_may_look_nowhere_stays_a_number() -> None:
    """Padding is computed with the rest of the batch."""
    q = np.ones((1, 3, 1024, 5), np.float32)
    mask = np.full((1, 1, 1024, 1024), np.finfo(np.float32).min)
    mask[..., 512:, 512:] = 0
    assert np.isfinite(transformer.attention(q, q, q, mask, IN_BLOCKS)).all()


def test_few_scores_are_there_at_a_time_and_none_that_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    original = transformer.softmax

    def spy(x: Any, xp: Any) -> Any:
        shapes.append(x.shape)
        return original(x, xp)

    monkeypatch.setattr(transformer, "softmax", spy)
    monkeypatch.setattr(numpy_backend, "MAX_SCORES", 30)
    monkeypatch.setattr(numpy_backend, "QUERIES", 3)
    model = make()
    model.generate([5, 3, 17, 2, 1], max_tokens=2, ignore_eos=True)
    layers = model.config.n_layer
    prefill = [(1, 3, 3, 3), (1, 2, 2, 5), (1, 1, 2, 5)]
    assert shapes == prefill * layers + [(1, 3, 1, 16)] * layers


@pytest.mark.parametrize("shape", [(1, 7), (13, 7), (13, 130), (7,), (2, 3, 5), (0, 7)])
def test_gelu_in_blocks_is_gelu(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(numpy_backend, "MAX_GELU_NUMBERS", 30)
    x = np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(transformer.gelu(x, IN_BLOCKS), transformer.gelu(x, PLAIN))


def test_attention_that_an_experiment_replaces_is_called_with_all_heads() -> None:
    shapes: list[tuple[int, ...]] = []

    def attention(q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
        shapes.append(q.shape)
        return transformer.attention(q, k, v, mask, xp)

    plain = make()
    ours = Model(plain.params, plain.config, backend=gpt_xp.with_parts("numpy", attention=attention))
    tokens = small_tokens("prime")[0]
    assert_values(ours.logits(tokens), plain.logits(tokens), TOLERANCE["same", "float32"])
    assert set(shapes) == {(1, 3, len(tokens), 13)}


def test_softmax_that_an_experiment_replaces_is_called_with_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is computed in blocks for long prompts, and in one piece where its softmax is replaced."""
    monkeypatch.setattr(numpy_backend, "MAX_SCORES", 30)
    shapes: list[tuple[int, ...]] = []

    def softmax(x: Any, xp: Any) -> Any:
        shapes.append(x.shape)
        return transformer.softmax(x, xp)

    plain = make()
    ours = Model(plain.params, plain.config, backend=gpt_xp.with_parts("numpy", softmax=softmax))
    tokens = small_tokens("prime")[0]
    assert_values(ours.logits(tokens), plain.logits(tokens), TOLERANCE["same", "float32"])
    assert {shape[:3] for shape in shapes} == {(1, 3, len(tokens))}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_namespace_is_used_as_it_is(dtype: str) -> None:
    plain = make(dtype=dtype)
    other = plain.backend.replace(xp=SimpleNamespace(**vars(PLAIN) | {"tanh": lambda x: x * 0}))
    wrong = Model(plain.params, plain.config, backend=other)
    tokens = small_tokens("prime", 1)[0]
    assert np.abs(wrong.logits(tokens) - plain.logits(tokens)).max() > 0.1


# Threads. BLAS has `threads` threads while gpt-xp computes, and the user's number before and after.


@pytest.fixture
def three() -> Iterator[None]:
    """Give BLAS three threads, which no Python thread controls."""
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    before = [each.num_threads for each in libraries]
    for each in libraries:
        numpy_backend._set_threads(each, 3)
    yield
    for each, n in zip(libraries, before, strict=True):
        numpy_backend._set_threads(each, n)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of threads of BLAS in each product of NumPy."""
    found: list[int] = []
    original = np.matmul

    def spy(*args: Any, **options: Any) -> Any:
        found.append(blas_threads())
        return original(*args, **options)

    monkeypatch.setattr(np, "matmul", spy)
    return found


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (1, 1), (2, 2)])
def test_blas_has_so_many_threads_while_gpt_xp_computes(
    three: None, seen: list[int], threads: int | None, expected: int
) -> None:
    model = make(threads=threads)
    model.generate([5, 3, 17], max_tokens=3, ignore_eos=True)
    model.logits([5, 3])
    model.score([5, 3])
    assert set(seen) == {expected}
    assert blas_threads() == 3
    assert model.backend.settings()["threads"] == str(threads or 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_blas_has_one_thread_beside_quantized_weights(
    three: None, seen: list[int], small_blocks: None, kind: str, threads: int | None
) -> None:
    """Threads of Numba and BLAS that take turns would wait for each other."""
    model = make(kind, threads=threads)
    for rows in (1, 8, 9):  # 9 x 11 rows are multiplied by BLAS
        seen.clear()
        model.logits([list(range(11))] * rows)
        assert set(seen) == {1}
        assert blas_threads() == 3


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_step_that_fails_leaves_blas_its_threads(
    three: None, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PromptError("a step that fails")

    model = make(kind, threads=1)
    monkeypatch.setattr(transformer, "gelu", fail)
    with pytest.raises(PromptError, match="a step that fails"):
        model.logits([[5, 3, 17]] * 40)
    assert blas_threads() == 3


@pytest.mark.parametrize("same", [False, True])
def test_limits_that_overlap_on_two_threads(three: None, same: bool) -> None:
    controllers = [threadpoolctl.ThreadpoolController() for _ in range(2)]
    one = numpy_backend.LIMITS(controllers[0], 1)
    other = numpy_backend.LIMITS(controllers[0 if same else 1], 2)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        found = [blas_threads()]
        for thread, step in (
            (first, one.__enter__), (second, other.__enter__),
            (first, lambda: one.__exit__(None, None, None)), (second, lambda: other.__exit__(None, None, None)),
        ):  # fmt: skip
            thread.submit(step).result(20)
            found.append(blas_threads())
    assert found == [3, 1, 2, 2, 3]


@pytest.mark.parametrize("settings", [({}, {}), ({"threads": 1}, {}), ({}, {"kind": "int8"})])
def test_models_on_several_threads_leave_blas_its_threads(three: None, settings: Any) -> None:
    models = [make(**each) for each in settings]
    expected = [model.logits(small_tokens("prime", 2)) for model in models]
    failed: list[BaseException] = []

    def run(model: Model, right: Any) -> None:
        try:
            for _ in range(10):
                np.testing.assert_allclose(model.logits(small_tokens("prime", 2)), right, rtol=0, atol=1e-4)
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=run, args=each) for each in zip(models, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failed
    assert not any(caller.is_alive() for caller in callers)
    assert blas_threads() == 3


def test_float32_starts_no_python_threads(small_blocks: None) -> None:
    model, before = make(threads=3), threading.active_count()
    model.logits([[5, 3, 17]] * 100)
    assert threading.active_count() == before


@pytest.fixture
def share() -> Callable[..., None]:
    """Return the function that shares work among Python threads."""
    with skipping_what_is_missing("numba"):
        return importlib.import_module("gpt_xp_backends.numpy_quantized").share


def test_work_that_is_shared_is_done_once_or_fails(share: Callable[..., None]) -> None:
    done: list[int] = []
    share(done.append, [(each,) for each in range(101)])
    assert sorted(done) == list(range(101))
    with pytest.raises(ZeroDivisionError):
        share(lambda each: done.append(1 // each), [(1,), (0,), (2,)])
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):  # as the caller has set it
        share(lambda each: done.append(each / np.zeros(1)), [(1,), (2,)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_has_threads_of_its_own(share: Callable[..., None]) -> None:
    code = """
import json, os, warnings
from gpt_xp_backends.numpy_quantized import share
warnings.simplefilter("ignore")  # Python warns of a fork while there are threads.
done = []
share(done.append, [(0,), (1,)])
pid = os.fork()
if not pid:
    share(done.append, [(2,), (3,)])
    os._exit(sorted(done) != [0, 1, 2, 3])
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""
    assert in_a_new_process(code) == 0
