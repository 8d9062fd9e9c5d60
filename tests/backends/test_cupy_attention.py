"""Attention of a decode step in two kernels: on the CPU, by CUDA's compiler, on a GPU, and by NumPy in their place.

The oracle is `transformer.py` in float64.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as PLAIN  # noqa: N812, as CuPy's is
import numpy as np
import pytest
from cuda_by_numpy import ByNumPy
from cuda_numbers import TOLERANCES, Counted, in_sixteenths, numbers
from cuda_on_cpu import Library, OnCPU, amid_nan, library_of, to_gpu
from gpt_xp_backends.captured_step import TracedCache
from gpt_xp_backends.cupy_backend.kernels import TYPES, programs
from gpt_xp_backends.cupy_backend.kernels.attention import NAME, SOURCE, attend, options
from gpt_xp_backends.cupy_backend.kernels.products import split_matmul, thin_matmul
from gpt_xp_backends.cupy_backend.kernels.programs import append, fused
from gpt_xp_backends.tracing import Calls, TracedArray, Tracer
from libraries import make_backend
from nvrtc import compile_for
from small_models import tree_map

from gpt_xp import GPT2Config
from gpt_xp import transformer as model
from gpt_xp.generation.step_functions import next_token_logits
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.tolerances import TOLERANCE

KINDS = [(dtype, d_head, n_slots) for dtype in TYPES for d_head, n_slots in ((16, 5), (24, 37), (64, 300))]


def planted(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    assert SOURCE.count(old) >= 1, old
    return lambda source: source.replace(old, new, count)


OTHER, BARRIER = "shared[thread + others]", "\n        __syncthreads();"
BUGS = {
    "another head's query": planted("head * q_head", "0 * q_head"),
    "another row's query": planted("batch * q_batch", "0 * q_batch"),
    "another head's keys": planted("head * k_head", "0 * k_head"),
    "another row's keys": planted("batch * k_batch", "0 * k_batch"),
    "another head's values": planted("head * v_head", "0 * v_head"),
    "another row's mask": planted("batch * mask_batch", "0 * mask_batch"),
    "heads and rows in another order": planted("blockIdx.x / n_head", "blockIdx.x % n_head"),
    "no scale": planted(" / scale", ""),
    "no mask": planted("score += (SUM)mask[slot * mask_slot];", ""),
    "no maximum taken off": planted("weights[slot] - largest", "weights[slot]"),
    "no barrier behind the query": planted("scale;\n    __syncthreads();", "scale;"),
    "no barrier behind the largest": planted("largest = shared[0];\n    __syncthreads();", "largest = shared[0];"),
    "no barrier in the maximum": planted(f": {OTHER};{BARRIER}", f": {OTHER};"),
    "no barrier in the sum": planted(f"+= {OTHER};{BARRIER}", f"+= {OTHER};"),
    "no barrier before the values are added": planted("    __syncthreads();\n    for (int i", "    for (int i"),
    "a slot beyond the last": planted("slot < SLOTS; slot += GROUPS", "slot <= SLOTS; slot += GROUPS"),
    "the last slot left out": planted("slot < SLOTS; slot += 256", "slot < SLOTS - 1; slot += 256", 2),
    "half of the groups": planted("each < GROUPS", "each < GROUPS / 2"),
    "slots without their stride": planted("slot * v_slot", "slot * D_HEAD"),
    "sums in half precision": planted("SUM sums[VECTOR]", "_Float16 sums[VECTOR]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    right = [(SOURCE, NAME, options(*kind)) for kind in KINDS]
    wrong = [(change(SOURCE), NAME, options("float32", 64, 300)) for change in BUGS.values()]
    return library_of(tmp_path_factory.mktemp("kernels"), right + wrong)


def operands(dtype: str, d_head: int, n_slots: int) -> tuple[np.ndarray, ...]:
    """Query, keys, values and mask as a decode step has them: two rows, three heads, and more slots than are read.

    Scores are exact in float32, and their exponentials overflow.
    """
    vector = 16 // np.dtype(dtype).itemsize
    q, *_ = in_sixteenths(numbers(1, (2, 1, 3, 3, d_head), dtype)).transpose(2, 0, 3, 1, 4)
    cache = in_sixteenths(numbers(2, (2, 2, 3, n_slots + 3, d_head + vector), dtype))
    cache[..., n_slots:, :] = np.nan
    mask = in_sixteenths(numbers(3, (2, 1, 1, n_slots + 2), "float32"))[..., :n_slots] + np.float32(90)
    mask[1, ..., : n_slots // 2] = np.finfo(np.float32).min
    return q, cache[0, ..., :n_slots, :d_head], cache[1, ..., :n_slots, :d_head], mask


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    q, k, v, mask = (x.astype(np.float64) for x in (q, k, v, mask))
    return np.asarray(model.attention(q * np.sqrt(q.shape[-1]) / scale, k, v, mask, PLAIN))


def check(cupy: Any, dtype: str, d_head: int, n_slots: int) -> None:
    given = operands(dtype, d_head, n_slots)
    out = attend(cupy)(*given, 4.0)
    assert out is not None
    right = expected(*given, 4.0)
    assert (out.shape, out.dtype) == (right.shape, dtype)
    error = np.abs(out - right).max() / np.abs(right).max()
    assert error <= TOLERANCES[dtype], f"off by {error}"
    assert np.isfinite(out.base).sum() == out.size, "written beside the heads"


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_heads(library: Library, kind: tuple[str, int, int], backwards: bool) -> None:
    check(OnCPU(library, backwards), *kind)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(library: Library, bug: str) -> None:
    def check_all() -> None:
        for backwards in (False, True):
            check(OnCPU(library, backwards, BUGS[bug]), "float32", 64, 300)

    with pytest.raises(AssertionError, match=r"off by|wait for ever|written beside"):
        check_all()


def test_nan_stays_visible(library: Library) -> None:
    for place in range(3):
        given = operands("float32", 64, 300)
        given[place][0, 1, -1, 7] = np.nan
        out = attend(OnCPU(library, backwards=False))(*given, 8.0)
        assert out is not None
        # A value is NaN in one column; a query or a key is in all of the head.
        wrong = np.isnan(out)
        assert wrong[0, 1].sum() == (1 if place == 2 else 64)
        assert wrong.sum() == wrong[0, 1].sum()


def test_what_the_kernel_cannot_is_refused() -> None:
    q, k, v, mask = operands("float32", 16, 5)
    compute = attend(None)
    odd = amid_nan((2, 3, 5, 17), "float32")
    cases = [
        (np.concatenate([q, q], axis=2), k, v, mask),  # two queries
        (q[..., :15], k[..., :15], v[..., :15], mask),  # no whole vectors
        (q, odd[..., :16], v, mask),
        (q, odd[..., 1:], v, mask),
        (q, k, k.swapaxes(-1, -2), mask),
        (q, k, v, mask.astype(np.float64)),
        (q, k, v, np.broadcast_to(mask, (2, 3, 1, 5)).copy()),
        (q, *(np.empty((2, 3, 20_000, 16), np.float32),) * 2, np.empty((2, 1, 1, 20_000), np.float32)),
    ]
    assert [compute(*case, 1.0) for case in cases] == [None] * len(cases)


# --- a decode step ----------------------------------------------------------------------------------------------------

CONFIG = GPT2Config(n_vocab=101, n_ctx=37, n_embd=48, n_head=3, n_layer=2)
SWITCHES = [frozenset(), frozenset({"append"}), frozenset({"attention"}), frozenset({"append", "attention"})]
ALL = frozenset({"append", "attention", "split"})


def params(dtype: str, n_layer: int = 2, kind: type = np.ndarray) -> dict[str, Any]:
    random, n = np.random.RandomState(5), CONFIG.n_embd

    def linear(n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {"w": random.standard_normal((n_in, n_out)) * 0.2, "b": random.standard_normal(n_out) * 0.2}

    def norm() -> dict[str, np.ndarray]:
        return {"g": 1 + random.standard_normal(n) * 0.2, "b": random.standard_normal(n) * 0.2}

    made = {
        "wte": random.standard_normal((CONFIG.n_vocab, n)) * 0.2,
        "wpe": random.standard_normal((CONFIG.n_ctx, n)) * 0.2,
        "blocks": [
            {
                "ln_1": norm(), "attn": {"c_attn": linear(n, 3 * n), "c_proj": linear(n, n)},
                "ln_2": norm(), "mlp": {"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)},
            }
            for _ in range(n_layer)
        ],
        "ln_f": norm(),
    }  # fmt: skip

    def aligned(leaf: np.ndarray) -> np.ndarray:
        spare = np.empty(leaf.size + 16, dtype)
        begin = -spare.ctypes.data % 16 // spare.itemsize
        array = spare[begin : begin + leaf.size].reshape(leaf.shape)
        array[...] = leaf
        return array.view(kind)

    return tree_map(aligned, made)


def step(dtype: str, namespace: Any, n_layer: int = 2, kind: type = np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Two rows that begin at different slots take a step after 25 tokens, in a ring of 23 slots of longer arrays."""
    weights, tokens = params(dtype, n_layer), np.random.RandomState(7).randint(0, 101, (2, 26)).astype(np.int32)
    cache = new_cache(CONFIG, weights["wpe"], 23, np.asarray([0, 4], dtype=np.int32), PLAIN)
    for begin, end in ((0, 20), (20, 23), (23, 25)):
        _, cache = next_token_logits(weights, tokens[:, begin:end], cache, end - begin, CONFIG, PLAIN)
    position = np.full((), 25, dtype=np.int32).view(kind)  # A graph has it on the device.
    longer = [[np.concatenate([x, np.full_like(x, np.nan)], axis=1)[:, :23] for x in layer] for layer in cache.layers]
    layers = [(k.view(kind), v.view(kind)) for k, v in longer]
    own = (TracedCache if isinstance(namespace, Tracer) else KVCache)(layers, position, cache.start)
    weights = tree_map(lambda leaf: leaf.view(kind), weights)
    return next_token_logits(weights, tokens[:, 25:], own, 1, CONFIG, namespace)


def namespace(cupy: Any, switches: frozenset[str]) -> Tracer:
    calls = Calls(
        (split_matmul if "split" in switches else thin_matmul)(cupy),
        fused(cupy),
        append(cupy) if "append" in switches else None,
        attend(cupy) if "attention" in switches else None,
    )
    return Tracer(PLAIN, calls)


def flat(cache: KVCache) -> list[np.ndarray]:
    return [x for layer in cache.layers for x in layer]


@functools.cache
def oracle() -> tuple[np.ndarray, KVCache]:
    return step("float64", PLAIN)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """All kernels of all ways to take a step."""
    with pytest.MonkeyPatch.context() as patch:
        by_numpy = ByNumPy(patch)
        cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": staticmethod(np.empty)})
        for dtype in TYPES:
            for switches in (*SWITCHES, ALL):
                step(dtype, namespace(cupy, switches))
        return library_of(tmp_path_factory.mktemp("kernels"), by_numpy.made)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("switches", [*SWITCHES, ALL], ids=lambda switches: " ".join(sorted(switches)) or "none")
def test_a_step_is_that_of_transformer_py(steps: Library, switches: frozenset[str], dtype: str) -> None:
    right, cache = oracle()
    for backwards in (False, True):
        logits, after = step(dtype, namespace(OnCPU(steps, backwards), switches))
        assert logits.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(logits, right, rtol=0, atol=TOLERANCE["logits", dtype] * np.abs(right).max())
        for ours, theirs in zip(flat(after), flat(cache), strict=True):
            tolerance = TOLERANCE["logits", dtype] * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        assert int(after.position) == 26


APPEND_BUGS = {
    "keys and values exchanged": ("? k : v", "? v : k"),
    "no keys": ("i >= n / 3", "i >= n / 3 * 2"),
    "no values": ("i >= n / 3", "i >= n / 3 && i < n / 3 * 2"),
    "the first row's cache": ("row * of_batch", "0 * of_batch"),
    "another head": ("i / d_head % n_head", "(i / d_head + 1) % n_head"),
    "no ring": ("*position % n_slots", "(*position - 3)"),
    "the slot before": ("*position % n_slots", "(*position - 1) % n_slots"),
    "numbers in another order": ("i % d_head]", "d_head - 1 - i % d_head]"),
}


@pytest.fixture(scope="module")
def wrong_steps(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels of a step with each of the bugs."""
    made = []
    for bug in APPEND_BUGS:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, bug)
            by_numpy = ByNumPy(patch)
            cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": staticmethod(np.empty)})
            step("float32", namespace(cupy, frozenset({"append"})))
            made += by_numpy.made
    return library_of(tmp_path_factory.mktemp("kernels"), made)


def plant(patch: pytest.MonkeyPatch, bug: str) -> None:
    parameters, store = programs.APPEND
    old, new = APPEND_BUGS[bug]
    assert old in store
    patch.setattr(programs, "APPEND", (parameters, store.replace(old, new)))


@pytest.mark.parametrize("bug", APPEND_BUGS)
def test_a_bug_planted_in_the_writes_is_found(wrong_steps: Library, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    plant(monkeypatch, bug)
    _, after = step("float32", namespace(OnCPU(wrong_steps, backwards=False), frozenset({"append"})))
    errors = [np.abs(ours - theirs).max() for ours, theirs in zip(flat(after), flat(oracle()[1]), strict=True)]
    assert max(errors) > 0.01


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("switches", "launches"), list(zip(SWITCHES, (14, 11, 12, 9), strict=True)))
def test_a_layer_is_few_launches(
    monkeypatch: pytest.MonkeyPatch, dtype: str, switches: frozenset[str], launches: int
) -> None:
    """The real CuPy 14.2 launches as many, on a CUDA that computes nothing."""
    by_numpy = ByNumPy(monkeypatch)
    cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": lambda *a, **k: np.empty(*a, **k).view(Counted)})
    counts = []
    for n_layer in (1, 2):
        made = namespace(cupy, switches)
        Counted.n, by_numpy.launched = 0, []
        step(dtype, made, n_layer=n_layer, kind=Counted)
        counts.append(Counted.n + len(by_numpy.launched))
    assert counts[1] - counts[0] == launches


def test_an_expression_that_is_no_attention_is_computed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    by_numpy = ByNumPy(monkeypatch)
    cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": staticmethod(np.empty)})
    xp = namespace(cupy, frozenset({"attention"}))
    q, k, v, mask = operands("float64", 16, 5)
    q, k, mask = q / 10, np.ascontiguousarray(k), np.where(mask < -1e30, -2, (mask - 90) / 4).astype(np.float32)

    def result(xp: Any, change: Callable[[Any, Any], Any]) -> Any:
        scores = xp.matmul(q, xp.matrix_transpose(k)) + mask
        return xp.matmul(change(xp, scores), v)

    def softmax_of_another_maximum(xp: Any, scores: Any) -> Any:
        top = xp.max(xp.exp(scores), axis=-1, keepdims=True)
        e = xp.exp(scores - top)
        return e / xp.sum(e, axis=-1, keepdims=True)

    def another_sum(xp: Any, scores: Any) -> Any:
        e = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        return e / xp.sum(scores * scores, axis=-1, keepdims=True)

    def no_exponential(xp: Any, scores: Any) -> Any:
        e = xp.tanh(scores - xp.max(scores, axis=-1, keepdims=True))
        return e / xp.sum(e * e, axis=-1, keepdims=True)

    def nothing(xp: Any, scores: Any) -> Any:
        return scores

    for change in (softmax_of_another_maximum, another_sum, no_exponential, nothing):
        found = xp.computed(result(xp, change))
        np.testing.assert_allclose(found, result(PLAIN, change), rtol=1e-9)
    assert NAME not in by_numpy.launched
    found = result(xp, lambda xp, scores: model.softmax(scores, xp))
    assert isinstance(found, TracedArray)
    assert by_numpy.launched[-1] == NAME
    np.testing.assert_allclose(xp.computed(found), result(PLAIN, lambda xp, x: model.softmax(x, xp)), rtol=1e-9)


def test_a_write_of_something_else_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in another order, of two tokens, not of one expression, or of one that is computed already."""
    by_numpy = ByNumPy(monkeypatch)
    cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": staticmethod(np.empty)})
    xp = namespace(cupy, frozenset({"append"}))
    x, w = numbers(1, (2, 48), "float32"), numbers(2, (48, 144), "float32")

    def heads(xp: Any, n_seq: int) -> Any:
        qkv = xp.matmul(x, w) + w[0]
        return xp.permute_dims(xp.reshape(qkv, (-1, n_seq, 3, 3, 16)), (2, 0, 3, 1, 4))

    def computed_before(qkv: Any, other: Any) -> tuple[Any, Any]:
        xp.computed(qkv[0])
        return qkv[1], qkv[2]

    cases: list[tuple[int, Callable[[Any, Any], tuple[Any, Any]]]] = [
        (1, lambda qkv, other: (qkv[1], other[2])),
        (1, lambda qkv, other: (qkv[2], qkv[1])),
        (1, lambda qkv, other: (qkv[1], qkv[1])),
        (1, lambda qkv, other: (qkv[1, ::-1], qkv[2, ::-1])),
        (2, lambda qkv, other: (qkv[1], qkv[2])),
        (1, computed_before),
    ]
    for n_seq, choose in cases:
        caches = []
        for namespace_, kind in ((xp, TracedCache), (PLAIN, KVCache)):
            k, v = choose(heads(namespace_, n_seq), heads(namespace_, n_seq))
            cache = new_cache(CONFIG, x, 23, np.zeros(k.shape[0], np.int32), PLAIN)
            own = kind(cache.layers, np.full((), 9, dtype=np.int32), cache.start)
            own.layer(1).append(k, v, namespace_)
            caches.append(own)
        for ours, theirs in zip(flat(caches[0]), flat(caches[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", TYPES)
def test_cudas_compiler_takes_it(monkeypatch: pytest.MonkeyPatch, dtype: str, architecture: str) -> None:
    by_numpy = ByNumPy(monkeypatch)
    cupy = type("CuPy", (), {"RawKernel": by_numpy, "empty": staticmethod(np.empty)})
    step(dtype, namespace(cupy, ALL))
    for source, _, defines in dict.fromkeys(by_numpy.made):
        assert not compile_for(architecture, source, defines)
    for d_head, n_slots in ((64, 1024), (64, 128)):
        assert not compile_for(architecture, SOURCE, options(dtype, d_head, n_slots))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_heads_on_a_gpu(kind: tuple[str, int, int]) -> None:
    make_backend("cupy", kind[0])  # or skip
    cupy = sys.modules["cupy"]
    given = operands(*kind)
    out = attend(cupy)(*(to_gpu(cupy, x) for x in given), 4.0).get()
    right = expected(*given, 4.0)
    assert np.abs(out - right).max() <= TOLERANCES[kind[0]] * np.abs(right).max()
