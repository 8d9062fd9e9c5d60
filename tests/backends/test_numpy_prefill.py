"""Steps of a model with many tokens on NumPy, which run on threads: against the naive model, and plain NumPy."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from commands import in_a_new_process
from comparison import assert_values
from gpt_xp_backends import numpy_backend, numpy_blocks
from libraries import quantized
from naive_gpt2 import gpt2 as naive_gpt2
from small_models import CONFIGS, small_params, small_tokens, tree_map
from small_quantized import KINDS, float64_of, small

from gpt_xp import Model
from gpt_xp.errors import PromptError
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps of two tokens and more run on threads; this has how many threads BLAS has in each of their products."""
    seen: list[int] = []
    original = numpy_blocks.matmul

    def spy(*args: Any) -> Any:
        seen.append(blas_threads())
        return original(*args)

    monkeypatch.setattr(numpy_blocks, "matmul", spy)
    monkeypatch.setattr(numpy_blocks, "BLOCK", 64)
    monkeypatch.setattr(numpy_backend, "MANY", dict.fromkeys(numpy_backend.MANY, 2))
    before = blas_threads()
    yield seen
    assert blas_threads() == before


def blas_threads() -> int:
    found = [each for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]
    bundled = [each for each in found if "numpy" in each["filepath"]]  # SciPy, which Numba imports, has its own
    return max(each["num_threads"] for each in bundled or found)


def make(kind: str | None = None, **settings: Any) -> Model:
    """A small model, in float32 or of quantized weights."""
    backend = get_backend("numpy", **settings)
    if kind:
        params, config = small(kind)
        return Model(params, config, backend=quantized(backend))
    params = tree_map(lambda leaf: leaf.astype(backend.dtype), small_params("prime"))
    return Model(params, CONFIGS["prime"], backend=backend)


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_logits(calls: list[int], kind: str | None, threads: int | None) -> None:
    model = make(kind, threads=threads)
    tokens = small_tokens("prime", 2)
    logits = model.logits(tokens)
    assert set(calls) == {1}
    for found, row in zip(logits, tokens, strict=True):
        expected = naive_gpt2(row, **float64_of(model.params), n_head=model.config.n_head)
        assert_values(found, expected, TOLERANCE["logits", "float32"])
    np.testing.assert_array_equal(model.logits(tokens), logits)  # to the last bit


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_generated_text_is_that_of_plain_numpy(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    model, prompts = make(kind, threads=2), [[5, 3, 17, 2], [7], [11, 1, 30]]
    found = [model.generate(prompts, max_tokens=7, ignore_eos=True) for _ in range(2)]
    n_products = 6 * model.config.n_layer + 1  # six in each layer, and the logits
    assert len(calls) == 2 * 7 * n_products, "three rows are many, in decoding too"
    monkeypatch.setattr(numpy_backend, "MANY", dict.fromkeys(numpy_backend.MANY, 10**6))
    plain = model.generate(prompts, max_tokens=7, ignore_eos=True)
    assert len(calls) == 2 * 7 * n_products
    for one, other, right in zip(*found, plain, strict=True):
        assert one.token_ids == other.token_ids == right.token_ids
        assert one.logprobs == other.logprobs
        np.testing.assert_allclose(one.logprobs, right.logprobs, rtol=0, atol=1e-4)


def test_decoding_starts_no_threads(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_backend, "MANY", dict.fromkeys(numpy_backend.MANY, 5))
    before = threading.active_count()
    model = make(threads=3)
    model.generate([5, 3, 17, 2], max_tokens=7, ignore_eos=True)
    assert not calls
    assert threading.active_count() == before
    model.generate([5, 3, 17, 2, 1], max_tokens=7, ignore_eos=True)
    assert len(calls) == 6 * model.config.n_layer + 1
    assert threading.active_count() == before + 2


def test_fewer_tokens_are_many_after_a_long_prompt(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_backend, "MANY", {"plain": 17, "long": 5, "quantized": 5})
    monkeypatch.setattr(numpy_backend, "LONG", 17)
    monkeypatch.setattr(numpy_backend, "ROWS", 16)
    monkeypatch.setattr(numpy_backend, "SLOTS", 1)
    model = make(threads=2)
    for n_tokens, n_steps in ((16, 0), (16 + 4, 0), (16 + 5, 1)):
        model.generate([5] * n_tokens, max_tokens=2, ignore_eos=True)
        assert len(calls) == n_steps * (6 * model.config.n_layer + 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_namespace_is_used_as_it_is(calls: list[int], dtype: str) -> None:
    model = make("int8", dtype=dtype)  # in float64 there are no products by Numba, and none in blocks
    tokens = small_tokens("prime", 1)[0]
    expected = naive_gpt2(tokens, **float64_of(model.params), n_head=model.config.n_head)
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", dtype])
    assert bool(calls) == (dtype == "float32")
    calls.clear()
    backend = get_backend("numpy")
    other = backend.replace(xp=SimpleNamespace(**vars(backend.xp) | {"tanh": lambda x: x * 0}))
    plain = make()
    wrong = Model(plain.params, plain.config, backend=other)
    assert np.abs(wrong.logits(tokens) - plain.logits(tokens)).max() > 0.1


def test_blocks_that_fail_leave_blas_its_threads(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = make(threads=2), blas_threads()

    def fail(*_: Any) -> None:
        raise PromptError("a step that fails")

    with monkeypatch.context() as patch:
        patch.setattr(numpy_blocks, "compute", fail)
        with pytest.warns(RuntimeWarning, match="computed as it stands from now on, and slower: .*a step that fails"):
            model.logits([5, 3])
    assert blas_threads() == before
    assert get_backend("numpy").settings()["threads"] == str(before)


def logits_on_threads(models: list[Model], times: int) -> None:
    failed: list[BaseException] = []

    def run(model: Model) -> None:
        try:
            for _ in range(times):
                model.logits(small_tokens("prime", 2))
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=run, args=(model,)) for model in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failed
    assert not any(caller.is_alive() for caller in callers)


@pytest.mark.parametrize("settings", [({}, {}), ({"threads": 1}, {}), ({}, {"kind": "int8"})])
def test_steps_on_several_threads_leave_blas_its_threads(calls: list[int], three: None, settings: Any) -> None:
    models = [make(**each) for each in settings]
    for _ in range(5):
        logits_on_threads(models, 2)
        assert blas_threads() == 3
    assert set(calls) == {1}


@pytest.fixture
def three() -> Iterator[None]:
    """A BLAS of three threads, which no thread of Python's has for itself."""
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    before = numpy_backend._by_any_thread(controller, lambda: controller.limit(limits=3))
    yield
    numpy_backend._by_any_thread(controller, before.restore_original_limits)


@pytest.mark.parametrize("same", [False, True])
def test_limits_that_overlap_on_two_threads(three: None, same: bool) -> None:
    controllers = [threadpoolctl.ThreadpoolController() for _ in range(2)]
    one = numpy_backend.LIMITS(controllers[0], 1)
    other = numpy_backend.LIMITS(controllers[0 if same else 1], 2)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        seen = [blas_threads()]
        for thread, step in (
            (first, one.__enter__), (second, other.__enter__),
            (first, lambda: one.__exit__(None, None, None)), (second, lambda: other.__exit__(None, None, None)),
        ):  # fmt: skip
            thread.submit(step).result(20)
            seen.append(blas_threads())
    assert seen == [3, 1, 2, 2, 3]


def test_the_pool_is_as_large_as_blas_was(calls: list[int]) -> None:
    sizes: list[int] = []
    with threadpoolctl.threadpool_limits(3, user_api="blas"), pytest.MonkeyPatch.context() as patch:
        inner = make()

        def nested(*args: Any) -> Any:
            patch.setattr(numpy_blocks, "matmul", lambda pool, *rest: sizes.append(pool.n) or original(pool, *rest))
            inner.logits([5, 3])
            return original(*args)

        original = numpy_blocks.matmul
        patch.setattr(numpy_blocks, "matmul", nested)
        make().logits([5, 3])
    assert set(sizes) == {3}, "the limit of another step was taken for that of BLAS"


def test_blocks_are_not_imported_on_spec() -> None:
    code = """
import gpt_xp, json, sys
names = ("gpt_xp_backends.fusion", "gpt_xp_backends.numpy_blocks")
found = [[name for name in names if name in sys.modules]]
model = gpt_xp.load(backend="numpy")
model.generate("ROMEO:", max_tokens=3)
found.append([name for name in names if name in sys.modules])
model.generate([1] * 256, max_tokens=1)
print(json.dumps([*found, [name for name in names if name in sys.modules]]))
"""
    assert in_a_new_process(code) == [[], [], ["gpt_xp_backends.fusion", "gpt_xp_backends.numpy_blocks"]]
