"""Decoding by a CUDA graph: what is captured when, what is replayed, and what happens where it goes wrong.

Without a GPU, NumPy stands in for CuPy, and its graph is a call that is made again with the very arrays of the capture.
`pytest -m gpu` runs the real one.
"""

import functools
import gc
import importlib
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCuPy, FakeGraph, arrays_of, replayed, same, small
from folders import BENCHMARKS
from gpt_xp_backends.captured_step import BoundStep
from gpt_xp_backends.cupy_backend import CuPyBackend, adapter
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

from gpt_xp import Backend, Model
from gpt_xp.errors import BackendError
from gpt_xp.quantization import quantize
from gpt_xp.tolerances import TOLERANCE

TOKENS = small_tokens("prime")[0].tolist()
UNEVEN = [TOKENS[:3], TOKENS[:17], TOKENS[:1]]
STEP, REPLAY = ["step"], ["launch"]
CAPTURE = ["sync", "run", "wait", "begin", "end"]  # "run" is a step by the graph's kernels
MISTRUSTED = [*CAPTURE, "sync", "step"]
COMPARE = ["launch", "sync", "step"]


def graph_setting(model: Model) -> str:
    return model.backend.settings()["cuda_graph"]


def test_the_first_graph_is_compared_and_all_later_steps_are_replayed(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    assert graph_setting(model) == "not yet"
    out = model.generate(TOKENS[:5], max_tokens=2)
    assert cupy.log == MISTRUSTED
    assert graph_setting(model) == "not yet"
    cupy.log.clear()
    out = model.generate(TOKENS[:5], max_tokens=9)
    assert cupy.log == COMPARE + 7 * REPLAY
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert graph_setting(model) == "yes"
    assert None in cupy.pools, "the allocator is put back"
    assert set(cupy.RawKernel.launched) == {"thin_product", "fused"}


@pytest.mark.parametrize(
    "gelu",
    [
        lambda x, xp: 0.5 * x * (1 + xp.tanh(0.79788456 * (x + 0.044715 * x**3))),
        lambda x, xp: 0 * np.asarray(x) + x,  # as a hook that collects numbers
    ],
    ids=["a power", "its numbers"],
)
def test_a_step_that_cannot_be_captured_is_taken_as_it_stands(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, gelu: Any
) -> None:
    monkeypatch.setattr("gpt_xp.transformer.gelu", gelu)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match=r"goes on without a CUDA graph.*GPT_XP_CUPY_GRAPH=0") as warned:
        found = model.generate(TOKENS[:5], max_tokens=9)
    same(found, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert len(warned) == 1
    assert "begin" not in cupy.log
    assert cupy.log[-8:] == 8 * STEP


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 5, "top_k": 20}], ids=["greedy", "sampled"])
def test_the_text_is_the_plain_one(cupy: FakeCuPy, options: dict[str, Any]) -> None:
    actual = small(CuPyBackend()).generate(UNEVEN, max_tokens=None, ignore_eos=True, **options)
    # 17 + 37 > 37 slots: the ring begins again.
    same(actual, small(make_backend("numpy")).generate(UNEVEN, max_tokens=None, ignore_eos=True, **options))
    assert cupy.log.count("begin") == 1


def test_each_size_of_the_cache_has_a_graph_of_its_own_which_the_next_generation_finds(cupy: FakeCuPy) -> None:
    prompt = small_tokens("long")[0, :17].tolist()
    model, plain = small(CuPyBackend(), "long"), small(make_backend("numpy"), "long")
    options: dict[str, Any] = {"max_tokens": None, "ignore_eos": True}
    actual = model.generate(prompt, **options)
    assert cupy.log.count("begin") == 3  # of 128, 256 and 307 slots
    assert cupy.log.count("step") == 6  # two for each
    same(actual, plain.generate(prompt, **options))
    # The arrays have 307 slots from now on. Their first 128 and 256 are other arrays than those of that size were.
    options["max_tokens"] = 280
    expected = plain.generate(prompt[:11], **options)
    for log in (CAPTURE + 116 * REPLAY + CAPTURE + 127 * REPLAY + 34 * REPLAY, 279 * REPLAY):
        cupy.log.clear()
        actual = model.generate(prompt[:11], **options)
        assert cupy.log == log
        same(actual, expected)
    cupy.recorded = None
    del model
    gc.collect()
    assert cupy.freed == 5


@pytest.mark.parametrize("lengths", [(1, 17, 3), (11, 2, 29)])
def test_the_next_batch_has_its_own_prompts_and_starts(cupy: FakeCuPy, lengths: tuple[int, ...]) -> None:
    model, prompts = small(CuPyBackend()), [TOKENS[3 : 3 + length] for length in lengths]
    model.generate(UNEVEN, max_tokens=8, ignore_eos=True)
    cupy.log.clear()
    actual = model.generate(prompts, max_tokens=8, ignore_eos=True)
    assert cupy.log == 7 * REPLAY
    same(actual, small(make_backend("numpy")).generate(prompts, max_tokens=8, ignore_eos=True))


def test_a_batch_of_another_size_takes_the_place_of_the_cache_that_is_kept(cupy: FakeCuPy) -> None:
    made: list[list[weakref.ref[Any]]] = []
    backend = CuPyBackend()
    original = backend.new_cache

    def spy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive = {id(array) for cache in made for each in cache if (array := each()) is not None}
        assert len(alive) <= 2 * CONFIGS["prime"].n_layer, "there is never more than one, kept or used"
        cache = original(*args, **kwargs)
        made.append([weakref.ref(x.base) for x in arrays_of(cache)])
        return cache

    model = small(backend.replace(new_cache=spy))
    for prompts in (TOKENS[:5], TOKENS[:7], UNEVEN, TOKENS[:5]):
        model.generate(prompts, max_tokens=9)
        cupy.recorded = None
    assert [all(each() is None for each in cache) for cache in made] == [True, True, True, False]
    # The last is of the kind of the first, which has agreed: it is captured, and no step is taken without a graph.
    first = MISTRUSTED + COMPARE + 6 * REPLAY
    assert cupy.log == first + 8 * REPLAY + first + CAPTURE + 7 * REPLAY


def test_a_graph_gives_its_memory_back(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    for prompts in (TOKENS[:5], TOKENS[:7], UNEVEN):
        model.generate(prompts, max_tokens=9)
        cupy.recorded = None
    gc.collect()
    assert cupy.freed == 1, "the graph of one row went with its cache"
    backend = model.backend
    assert backend.peak_memory() == 1007, "there was one graph at a time, beside the pool of all"
    del model
    gc.collect()
    assert cupy.freed == cupy.log.count("begin") == 2


def test_another_device_is_waited_for_and_gets_its_memory_back(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend(device="cuda:1"))
    model.generate(TOKENS[:5], max_tokens=9)
    model.backend.synchronize(np.zeros(1))
    cupy.recorded = None
    del model
    gc.collect()
    assert (cupy.freed, cupy.waited, cupy.device) == (1, [1], 0)


def test_speculation_goes_back_and_forth(cupy: FakeCuPy) -> None:
    options: dict[str, Any] = {"max_tokens": 25, "ignore_eos": True}
    actual = small(CuPyBackend()).generate([5, 6] * 4, speculate=True, **options)
    same(actual, small(make_backend("numpy")).generate([5, 6] * 4, **options))


def test_two_generations_in_turns_have_a_cache_and_a_graph_each(cupy: FakeCuPy) -> None:
    model = small(CuPyBackend())
    prompts = TOKENS[:5], TOKENS[9:12]
    streams = [model.stream(prompt, max_tokens=9) for prompt in prompts]
    pieces = [piece for pair in zip(*streams, strict=True) for piece in pair]
    assert cupy.log == 2 * MISTRUSTED + COMPARE + 13 * REPLAY, "one graph of the kind is compared"
    plain = small(make_backend("numpy"))
    same([each.result for each in pieces if each.result], [plain.generate(each, max_tokens=9) for each in prompts])


def test_arrays_are_the_callers_own(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    decoder, kept = small(backend)._decoder, []
    _, cache = decoder.prefill([TOKENS[:5]])
    tokens = [np.asarray([[token]], dtype=np.int32) for token in TOKENS[5:11]]
    for token in tokens:
        logits, cache = decoder._step(token, cache, 1)
        kept.append(logits)
    assert [token.item() for token in tokens] == TOKENS[5:11]
    assert cupy.log[-3:] == 3 * REPLAY
    # A fork of the cache has its own arrays, and no graph yet.
    kept.append(decoder.decode([TOKENS[11]], cache.copy(backend.xp))[0])
    assert cupy.log[-5:] == CAPTURE
    expected = small(make_backend("numpy")).logits(TOKENS[:12])[5:]
    np.testing.assert_allclose(np.concatenate(kept), expected, atol=20 * TOLERANCE["same", "float32"])
    assert cache.position == 11


def test_it_is_for_plain_weights_and_few_rows(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CuPyBackend()
    small(backend).generate([[1]] * 17, max_tokens=6)
    Model(quantize(small_params("prime"), "int8"), CONFIGS["prime"], backend=backend.quantized()).generate([1])
    assert set(cupy.log) == {"step"}
    monkeypatch.setenv("GPT_XP_CUPY_GRAPH", "0")
    off = CuPyBackend()
    small(off).generate([1], max_tokens=6)
    assert set(cupy.log) == {"step"}
    assert off.settings()["cuda_graph"] == "no (GPT_XP_CUPY_GRAPH=0)"
    assert (off.cache_slots(17, 1024), backend.cache_slots(17, 1024)) == (64, 128)


def fail() -> None:
    raise RuntimeError("no such thing\nand more")


@pytest.mark.parametrize("place", ["wait", "run", "begin", "capture", "end", "launch"])
def test_where_it_fails_the_text_is_the_plain_one_and_one_warning_says_so(cupy: FakeCuPy, place: str) -> None:
    cupy.break_at[place] = fail
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="slower: RuntimeError: no such thing .GPT_XP_CUPY_GRAPH=0") as warnings:
        out = [model.generate(prompt, max_tokens=9) for prompt in (TOKENS[:5], TOKENS[9:12])]
    assert len(warnings) == 1
    plain = small(make_backend("numpy"))
    same(out, [plain.generate(prompt, max_tokens=9) for prompt in (TOKENS[:5], TOKENS[9:12])])
    assert cupy.log[-12:] == 12 * STEP
    assert isinstance(warnings[0].message, RuntimeWarning)
    assert isinstance(warnings[0].message.__cause__, RuntimeError), "it says where, for who asks"
    # What has begun to capture is made to end it.
    assert cupy.log.count("end") == (place in ("begin", "capture", "end", "launch"))
    assert graph_setting(model) == "no (RuntimeError: no such thing)"


def spoil_logits(graph: FakeGraph) -> None:
    graph.arrays[0].array()[...] *= 1.001


def spoil_logits_by_nan(graph: FakeGraph) -> None:
    graph.arrays[0].array()[0, 3] = np.nan


def spoil_cache(graph: FakeGraph) -> None:
    spoil_logits(graph)
    for each in graph.arrays[1:]:
        each.array()[...] = np.nan


@pytest.mark.parametrize("spoil", [spoil_logits, spoil_logits_by_nan, spoil_cache])
def test_a_graph_that_computes_something_else_is_not_used(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[FakeGraph], None]
) -> None:
    original = FakeGraph.launch

    def launch(self: FakeGraph) -> None:
        original(self)
        spoil(self)

    monkeypatch.setattr(FakeGraph, "launch", launch)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="its logits differ by"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))
    assert cupy.log.count("launch") == 1
    assert graph_setting(model).startswith("no (its logits differ by")


@pytest.mark.parametrize("frozen", ["token", "position"])
def test_a_graph_that_holds_on_to_what_it_was_captured_with_is_not_used(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    def freeze(self: FakeCuPy, function: Any, params: Any, tokens: Any, state: Any, *more: Any) -> Any:
        tokens = tokens.copy() if frozen == "token" else tokens
        state = (state[0].copy() if frozen == "position" else state[0], *state[1:])
        return functools.partial(replayed, function, params, tokens, state, *more)

    monkeypatch.setattr(FakeCuPy, "record", freeze)
    model = small(CuPyBackend())
    with pytest.warns(RuntimeWarning, match="its logits differ by"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))


def test_the_benchmark_compares_texts(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("cuda_graph")
    assert script.compare_texts("shakespeare") == "with a graph and without: 65 of 65 tokens are the same"
    assert "GPT_XP_CUPY_GRAPH" not in os.environ
    out = script.generate("shakespeare", "0")
    texts = iter([replace(out, token_ids=[*out.token_ids[:-1], 0]), out])
    with monkeypatch.context() as patch:
        patch.setattr(script, "generate", lambda model, setting: next(texts))
        with pytest.raises(SystemExit, match="64 of 65 tokens are the same, and the next was chosen by a margin of"):
            script.compare_texts("shakespeare")
    cupy.break_at["begin"] = fail
    with pytest.warns(RuntimeWarning), pytest.raises(SystemExit, match="GPT_XP_CUPY_GRAPH=1: cuda_graph is 'no"):
        script.compare_texts("shakespeare")


# d_head is 16, and the number of columns is no multiple of 32.
ALIGNED = replace(CONFIGS["124M-ratios"], n_embd=48, n_head=3, n_layer=2)


def aligned(backend: Backend) -> Model:
    random = np.random.RandomState(3)

    def weight(*shape: int) -> Any:
        return random.standard_normal(shape) * 0.2

    n, norm = ALIGNED.n_embd, {"g": weight(48), "b": weight(48)}
    sizes = {"attn": {"c_attn": (n, 3 * n), "c_proj": (n, n)}, "mlp": {"c_fc": (n, 4 * n), "c_proj": (4 * n, n)}}
    blocks = [
        {"ln_1": norm, "ln_2": norm}
        | {part: {name: {"w": weight(*size), "b": weight(size[1])} for name, size in each.items()}
           for part, each in sizes.items()}
        for _ in range(ALIGNED.n_layer)
    ]  # fmt: skip
    params = {"wte": weight(211, n), "wpe": weight(64, n), "blocks": blocks, "ln_f": norm}
    return Model(params, ALIGNED, backend=backend)


PREPARED = {
    "split": {"split_product", "table_product", "thin_product", "fused"},  # thin ones: keys and values
    "append": {"thin_product", "fused"},
    "attention": {"thin_product", "fused", "attend"},
    "greedy": {"thin_product", "fused", "likeliest_of_parts", "likeliest"},
    "all": {"split_product", "table_product", "fused", "attend", "likeliest_of_parts", "likeliest"},
    "split, attention": {"split_product", "table_product", "fused", "attend"},
}


@pytest.mark.parametrize("kernels", PREPARED)
def test_what_is_prepared_gives_the_same_text(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    expected = aligned(make_backend("numpy")).generate(UNEVEN, max_tokens=None, ignore_eos=True)
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", kernels)
    cupy.log.clear()
    model = aligned(CuPyBackend())
    actual = model.generate(UNEVEN, max_tokens=None, ignore_eos=True)
    assert set(cupy.log[-30:]) == {"launch"}
    assert graph_setting(model) == "yes"
    same(actual, expected)
    assert set(cupy.RawKernel.launched) == PREPARED[kernels]
    names = list(adapter.KERNELS) if kernels == "all" else kernels.split(", ")
    assert model.backend.settings()["kernels"] == ", ".join(names)
    # Sampled, and with a penalty: nothing of `greedy` takes part.
    for options in ({"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}):
        cupy.RawKernel.launched.clear()
        actual = model.generate(TOKENS[:5], max_tokens=9, **options)
        assert not {"likeliest", "likeliest_of_parts"} & set(cupy.RawKernel.launched)
        same(actual, aligned(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9, **options))


def test_ids_without_a_token_are_not_chosen_by_the_kernel(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", "greedy")
    found = []
    for backend in (CuPyBackend(), make_backend("numpy")):
        model = aligned(backend)
        chooser = model._generator.chooser
        chooser.allowed = chooser._allowed_ids(SizedTokenizer(range(1, 200, 2)))
        found.append(model.generate(TOKENS[:5], max_tokens=20, ignore_eos=True))
    same(*found)
    assert all(token % 2 for token in found[0].token_ids)


class SizedTokenizer:
    """A tokenizer without text, that has some of the ids alone."""

    eos_token_id = None

    def __init__(self, ids: range) -> None:
        self.ids, self.n_vocab = ids, max(ids) + 1

    def __len__(self) -> int:
        return len(self.ids)

    def token_bytes(self, token: int) -> bytes:
        return b""


def test_kernels_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_CUPY_KERNELS", "split,atention")
    with pytest.raises(BackendError, match="no kernels called 'atention': take some of split, append, attention"):
        CuPyBackend()


def test_a_prompt_is_computed_in_pieces_of_1024_tokens(cupy: FakeCuPy) -> None:
    chunk = CuPyBackend().chunk_tokens
    assert [chunk(batch) for batch in (1, 4, 8, 16, 32, 100)] == [1024, 1024, 512, 256, 128, 128]
    model, calls = small(CuPyBackend(), "long"), []
    step = model._decoder._step
    model._decoder._step = lambda tokens, *rest: calls.append(tokens.shape[1]) or step(tokens, *rest)  # type: ignore[method-assign]
    tokens = small_tokens("long")[0, :300].tolist()
    model.generate(tokens, max_tokens=2)
    assert calls == [300, 1]
    assert [piece.shape[1] for piece in model._decoder.prompt_logits([tokens])] == [300]


def check_texts_and_replays(monkeypatch: pytest.MonkeyPatch, create: Callable[[], Backend], dtype: str) -> None:
    """With a graph and without: one text. The graph was compared once for each kind of step, and then used."""
    replays: list[int] = []
    original = BoundStep.replay
    monkeypatch.setattr(BoundStep, "replay", lambda *args: replays.append(1) or original(*args))
    model = small(create(), "124M-ratios")
    monkeypatch.setenv("GPT_XP_CUPY_GRAPH", "0")
    plain = small(create(), "124M-ratios")
    # Of 39 steps after the first token, that of the capture is none; the last batch is of the kind of the first.
    for prompts, expected_replays in ((UNEVEN, 38), ([[5, 6, 7]], 38), ([[8, 9]], 39), (UNEVEN[::-1], 38)):
        before = len(replays)
        actual = model.generate(prompts, max_tokens=40, ignore_eos=True)
        assert len(replays) - before == expected_replays
        expected = plain.generate(prompts, max_tokens=40, ignore_eos=True)
        for ours, theirs in zip(actual, expected, strict=True):
            close = [margin < 1e-1 for margin in theirs.margins] + [True]
            n = close.index(True) if dtype == "float16" else len(close)  # up to a tie, within its rounding
            assert ours.token_ids[:n] == theirs.token_ids[:n]
    assert graph_setting(model) == "yes"


def test_the_text_is_the_one_without_a_graph(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    check_texts_and_replays(monkeypatch, CuPyBackend, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_on_a_gpu_the_text_is_the_one_without_a_graph(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    check_texts_and_replays(monkeypatch, functools.partial(make_backend, "cupy", dtype), dtype)
