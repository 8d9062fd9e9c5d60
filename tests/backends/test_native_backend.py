"""The backend `native`: tapes, packed weights, threads. Every test with the fixture `backend` runs on it too."""

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Result, posix
from comparison import TOLERANCE, assert_values
from libraries import make_backend
from small_models import CONFIGS, small_params
from small_quantized import small

import gpt_xp
from gpt_xp import Backend, GPT2Config, Model
from gpt_xp.checkpoint.tensors import build_params
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import BackendError, NumericalError, PromptError
from gpt_xp.generation.decoder import Decoder
from gpt_xp.kv_cache import KVCache
from gpt_xp.quantization import QuantizedWeight, quantization_of
from gpt_xp.registry import get_backend
from gpt_xp.transformer import gpt2_with_cache, hidden_states
from gpt_xp.tree import leaves, tree_map

LONG = CONFIGS["long"]
PROMPTS = np.random.default_rng(1).integers(0, LONG.n_vocab, (2, 61)).tolist()


@pytest.fixture
def native() -> Backend:
    """Return the backend, in float32."""
    return make_backend("native")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, native: Backend) -> list[tuple[int, ...]]:
    """Return a list that gets the shape of the tokens of each step that is traced."""
    from gpt_xp_backends.native_backend import step

    shapes, real = [], step.TracedStep.__init__

    def init(self: Any, function: Any, params: Any, tokens: Any, *args: Any) -> None:
        shapes.append(tokens.shape)
        real(self, function, params, tokens, *args)

    monkeypatch.setattr(step.TracedStep, "__init__", init)
    return shapes


def long_model(backend: Any, factor: float = 1.0) -> Model:
    """Return a model whose cache outgrows its first size. Another factor makes another model."""
    return Model(tree_map(lambda x: factor * x, small_params("long")), LONG, backend=backend)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_each_step_through_all_sizes_of_the_cache_is_numpys(native: Backend, traced: list[Any]) -> None:
    """The cache grows from 128 to 256 and 307 slots, and then its ring begins again."""
    ids = np.random.default_rng(3).integers(0, LONG.n_vocab, 330)
    found: list[Any] = []
    for backend in (native, "numpy"):
        model = long_model(backend)
        decoder = Decoder(model.params, LONG, model.backend)
        logits, cache = decoder.prefill([ids[:7].tolist(), ids[3:7].tolist()])
        steps = [logits]
        for token in ids[7:]:
            logits, cache = decoder.decode([token, token], cache)
            steps.append(logits)
        found.append(np.stack(steps))
    assert_values(found[0], found[1], TOLERANCE["logits", "float32"])
    assert traced == [(2, 7), (2, 1), (2, 1), (2, 1)]


def test_the_next_prompt_of_a_length_is_not_traced_again(native: Backend, traced: list[Any]) -> None:
    model = long_model(native)
    for prompt in ([1, 2, 3], [9, 8, 7], [5, 6, 7]):
        assert (
            model.generate(prompt, max_tokens=5).token_ids
            == long_model("numpy").generate(prompt, max_tokens=5).token_ids
        )
    assert traced == [(1, 3), (1, 1)]


def test_what_a_step_returned_stays_as_it_is(native: Backend) -> None:
    """The next step writes into the same memory."""
    decoder = Decoder(long_model(native).params, LONG, native)
    first, cache = decoder.prefill([[1, 2, 3]])
    kept = first.copy()
    again, _ = decoder.prefill([[4, 5, 6]])
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, again)
    assert isinstance(cache, KVCache)
    assert cache.position == 3


def test_a_function_that_needs_numbers_is_computed_as_it_stands(native: Backend, traced: list[Any]) -> None:
    def sorted_logits(params: Any, tokens: Any, cache: Any, config: Any, xp: Any) -> Any:
        logits, after = gpt2_with_cache(params, tokens, config, cache, xp)
        return xp.sort(logits, axis=-1), after

    model = long_model(native)
    step = native.compile(sorted_logits, static=("config", "xp"), donate=("cache",))
    tokens = np.array([[3, 1, 4]], np.int32)
    cache = native.new_cache(LONG, model.params["wpe"], 128, np.zeros(1, np.int32))
    found, _ = step(model.params, tokens, cache, config=LONG, xp=native.xp)
    assert_values(found[0], np.sort(long_model("numpy").logits([3, 1, 4]), axis=-1), TOLERANCE["logits", "float32"])
    assert traced == [(1, 3)]
    assert "sort needs numbers" in native.settings()["not_traced"]


def test_two_models_share_a_backend(native: Backend) -> None:
    models = [long_model(native, factor) for factor in (1, 1.3)]
    texts = [[each.generate([1, 2, 3], max_tokens=9).token_ids for each in models] for _ in range(2)]
    alone = [long_model("numpy", factor).generate([1, 2, 3], max_tokens=9).token_ids for factor in (1, 1.3)]
    assert texts == [alone, alone]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_python_threads_take_turns() -> None:
    make_backend("native")
    backend = gpt_xp.get_backend("native", threads=3)
    models = [long_model(backend, factor) for factor in (1, 1.3, 0.8)]
    alone = [long_model("numpy", factor).generate([1, 2, 3], max_tokens=30).token_ids for factor in (1, 1.3, 0.8)]
    barrier = threading.Barrier(3)

    def generate(model: Model) -> Any:
        barrier.wait()
        return model.generate([1, 2, 3], max_tokens=30).token_ids

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(generate, models)) == alone


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    make_backend("native")
    backend = gpt_xp.get_backend("native", threads=threads)
    found = long_model(backend).logits(PROMPTS)
    assert_values(found, long_model("numpy").logits(PROMPTS), TOLERANCE["logits", "float32"])
    assert backend.settings()["threads"] == str(threads)


IN_A_FORK = """
import os, gpt_xp
model = gpt_xp.load("shakespeare", backend=gpt_xp.get_backend("native", threads=2))
right = model.generate("To be", max_tokens=5).text
pid = os.fork()
if pid == 0:
    os._exit(0 if model.generate("To be", max_tokens=5).text == right else 1)
assert os.waitpid(pid, 0)[1] == 0
"""


@posix
def test_a_fork_computes_too() -> None:
    """It has none of the threads of its parent."""
    make_backend("native")
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_FORK], check=True, timeout=PATIENCE)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_float16_is_storage_alone() -> None:
    """The sums are float32: the text is that of a model whose weights are rounded to float16."""
    model = Model(small_params("124M-ratios"), CONFIGS["124M-ratios"], backend=make_backend("native", "float16"))
    rounded = small_params("124M-ratios")
    for block in rounded["blocks"]:
        for layer in (*block["attn"].values(), *block["mlp"].values()):
            layer["w"] = layer["w"].astype(np.float16).astype(np.float32)
    rounded["wte"] = rounded["wte"].astype(np.float16).astype(np.float32)
    expected = Model(rounded, CONFIGS["124M-ratios"], backend="numpy").logits([1, 2, 3, 4, 5])
    assert_values(model.logits([1, 2, 3, 4, 5]), expected, TOLERANCE["logits", "float32"])
    assert model.params["wte"].dtype == np.float16
    assert model.params["wpe"].dtype == np.float32


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_are_packed_and_unpacked(native: Backend, kind: str) -> None:
    params, config = small(kind)
    placed = native.place(params, config)
    assert quantization_of(placed) == kind
    for found, expected in zip(leaves(native.fetch(placed, config)), leaves(params), strict=True):
        if isinstance(expected, tuple):
            assert type(found) is type(expected)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert np.array_equal(found, expected)
    assert not any(isinstance(leaf, QuantizedWeight) for leaf in leaves(placed))


def test_a_gpt2_without_a_namespace_finds_that_of_its_weights(native: Backend) -> None:
    model = long_model(native)
    found = gpt_xp.gpt2(model.params, np.array([3, 1, 4]), LONG)
    assert_values(found, long_model("numpy").logits([3, 1, 4]), TOLERANCE["logits", "float32"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float64"}, "native does not compute in float64"), ({"device": "gpu"}, "no device 'gpu'")],
)
def test_what_it_cannot_do_is_said(options: dict[str, Any], message: str) -> None:
    make_backend("native")
    with pytest.raises(BackendError, match=message):
        gpt_xp.get_backend("native", **options)


def test_without_llvmlite_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    with pytest.raises(BackendError, match="llvmlite is not installed"):
        gpt_xp.get_backend("native")


# --- what a tape must not take for granted ----------------------------------------------------------------------------


def test_a_replayed_step_checks_that_its_tokens_fit(native: Backend) -> None:
    decoder = Decoder(long_model(native).params, LONG, native)
    tokens = np.arange(8, dtype=np.int32)[None]
    _, cache = decoder.prefill([list(range(20))])
    step = native.compile(gpt2_with_cache, static=("config", "xp"), donate=("cache",))

    def at(position: int) -> Any:
        return step(decoder.params, tokens, cache=cache._replace(position=position), config=LONG, xp=native.xp)

    at(20)
    for position in (cache.n_slots - 4, 2 * cache.n_slots - 7):
        with pytest.raises(PromptError, match=r"8 tokens were given, and the cache has room for \d before its ring"):
            at(position)


def test_a_replayed_step_checks_the_rows_of_the_cache(native: Backend) -> None:
    decoder = Decoder(long_model(native).params, LONG, native)
    _, one = decoder.prefill([[1, 2, 3]])
    _, two = decoder.prefill([[1, 2, 3], [4, 5, 6]])
    for _ in range(2):
        decoder.decode([1, 2], two)
    with pytest.raises(PromptError, match="it must be"):
        decoder.decode([1, 2], one)


def test_a_param_that_is_replaced_in_place_counts(native: Backend) -> None:
    model = long_model(native)
    decoder = Decoder(model.params, LONG, native)
    decoder.prefill([[1, 2, 3]])
    for name in ("g", "b"):
        model.params["ln_f"][name] = np.zeros(LONG.n_embd, np.float32)
    logits, _ = decoder.prefill([[1, 2, 3]])
    assert not logits.any()


@pytest.mark.parametrize(
    "view", [lambda x: np.repeat(x, 2)[::2], lambda x: x[::-1].copy()[::-1], lambda x: x.astype(">f8")]
)
def test_params_may_lie_in_memory_in_any_way(native: Backend, view: Any) -> None:
    params = tree_map(lambda x: view(x) if x.ndim == 1 else np.asfortranarray(x), small_params("long"))
    found = Model(params, LONG, backend=native).logits(PROMPTS)
    assert_values(found, long_model("numpy").logits(PROMPTS), TOLERANCE["logits", "float32"])


def test_a_product_takes_the_shapes_that_numpys_takes(native: Backend) -> None:
    w = long_model(native).params["blocks"][0]["mlp"]["c_fc"]["w"]
    plain = native.fetch({"w": w}, LONG)["w"]
    for shape in ((2, 21), (2, 3, 21), (5, 1, 21)):
        x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        assert_values(native.xp.matmul(x, w), x @ plain, TOLERANCE["function", "float32"])
    with pytest.raises(ValueError, match="rows of 21 numbers"):
        native.xp.matmul(np.ones((2, 5), np.float32), w)


@pytest.mark.parametrize("n_seq", [3, 9])
def test_nan_stays_nan(native: Backend, n_seq: int) -> None:
    params = small_params("long")
    params["blocks"][0]["attn"]["c_attn"]["b"][1] = np.nan
    with pytest.raises(NumericalError, match="logits are not finite"):
        Model(params, LONG, backend=native).generate(list(range(n_seq)), max_tokens=2)


def test_a_number_that_float16_cannot_hold_is_an_error() -> None:
    params = small_params("long")
    params["blocks"][0]["mlp"]["c_fc"]["w"][3, 4] = 1e5
    with pytest.raises(BackendError, match="a weight is too large for float16: take float32"):
        Model(params, LONG, backend=make_backend("native", "float16"))


def test_params_of_another_dtype_are_packed_anew(native: Backend) -> None:
    half = long_model(make_backend("native", "float16"))
    found = native.place(half.params, LONG)
    assert found["wte"].dtype == np.float32
    assert found["wte"].namespace is native.xp


def test_a_width_of_1(native: Backend) -> None:
    config = GPT2Config(n_vocab=7, n_ctx=9, n_embd=1, n_head=1, n_layer=2)
    random = np.random.default_rng(7)
    params = build_params(config, lambda name, shape: random.standard_normal(shape, np.float32))
    for n_seq in (1, 7):
        found = Model(params, config, backend=native).logits(list(range(n_seq)))
        assert_values(
            found, Model(params, config, backend="numpy").logits(list(range(n_seq))), TOLERANCE["logits", "float32"]
        )


def test_an_id_beyond_the_table_is_an_error(native: Backend) -> None:
    table = long_model(native).params["wte"]
    for ids in ([0, 31], [-1]):
        with pytest.raises(IndexError, match="there are 31 columns"):
            native.xp.take(table, np.array(ids), axis=0)


def test_a_model_is_freed_with_its_tapes(native: Backend) -> None:
    model = long_model(native)
    for n_seq in range(1, 9):
        model.generate(list(range(n_seq)), max_tokens=2)
    panels = weakref.ref(model.params["wte"].weight.panels)
    del model
    gc.collect()
    assert panels() is None


def test_prompts_of_many_lengths_share_their_memory(native: Backend) -> None:
    decoder = Decoder(long_model(native).params, LONG, native)
    decoder.prefill([list(range(30)) * 5])
    before = sum(block.nbytes for block in native._runner.arena._blocks)
    for n_seq in range(1, 150, 7):
        decoder.prefill([[1] * n_seq])
    assert sum(block.nbytes for block in native._runner.arena._blocks) < 1.5 * before


# --- activations of int8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stored_kind"), [("w8a8", "int8"), ("w4a8", "int4")])
def test_activations_are_rounded_and_int8_or_int4_is_stored(
    native: Backend, tmp_path: Path, kind: str, stored_kind: str
) -> None:
    params, config = small(stored_kind)
    plain, rounding = (Model(params, config, backend=each) for each in (native, native.rounding_activations()))
    ids = np.arange(3 * 23).reshape(3, 23) % config.n_vocab
    exact, found = plain.logits(ids), rounding.logits(ids)
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1
    assert np.array_equal(rounding.logits(ids[:2]), found[:2])  # Each row has a scale of its own.
    steps = rounding.generate([5, 3, 2], max_tokens=9, ignore_eos=True).token_ids
    assert steps == rounding.generate([5, 3, 2], max_tokens=9, ignore_eos=True).token_ids
    assert quantization_of(rounding.params) == kind
    assert gpt_xp.quantize(rounding.params, stored_kind) is rounding.params
    assert rounding._generator.decoder.params["wte"].kind == kind
    assert not rounding.backend.settings().get("not_traced")  # type: ignore[attr-defined]
    rounding.save(tmp_path)
    stored = read_params(tmp_path, config, quantization=stored_kind)
    for name in ("q", "scale"):
        assert np.array_equal(getattr(stored["wte"], name), getattr(params["wte"], name))


def test_w8a8_is_natives_alone(call: Callable[..., Result]) -> None:
    make_backend("native")
    done = call("-m", "shakespeare", "-b", "native", "--quantize", "w8a8", "--stats", "-n", "3", "To be")
    assert "w8a8" in done.err
    failed = call("-m", "shakespeare", "-b", "numpy", "--quantize", "w8a8", "-n", "3", "To be")
    assert failed.code
    assert "take the backend native" in failed.err


# --- processes in trouble ---------------------------------------------------------------------------------------------

MODEL = """
import os, signal, sys, threading, time, gpt_xp
def model():
    return gpt_xp.load("shakespeare", backend=gpt_xp.get_backend("native", threads=2))
"""
CTRL_C = """
m, came = model(), 0
right = m.generate("To be", max_tokens=9).text
end = time.monotonic() + 3
lock, is_inside = threading.Lock(), [False]  # No signal comes outside of `try`.
def interrupt():
    while time.monotonic() < end - 0.5:
        time.sleep(0.011)
        with lock:
            if is_inside[0]:
                is_inside[0] = False
                os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
while time.monotonic() < end:
    try:
        is_inside[0] = True
        assert m.generate("To be", max_tokens=9).text == right
        with lock:
            is_inside[0] = False
    except KeyboardInterrupt:
        came += 1
assert came > 20, came
assert m.generate("To be", max_tokens=9).text == right
"""
FIRST_USE_AT_ONCE = """
sys.setswitchinterval(1e-6)
m, texts = gpt_xp.load("shakespeare", backend="native"), []
at_once = threading.Barrier(6)
def use():
    at_once.wait()
    texts.append(m.trace("To be", "logits")["logits"].sum())
threads = [threading.Thread(target=use) for _ in range(6)]
[each.start() for each in threads], [each.join() for each in threads]
assert len(set(texts)) == 1 and len(texts) == 6
"""
FORK_WHILE_COMPUTING = """
m = model()
right = m.generate("To be", max_tokens=5).text
threading.Thread(target=lambda: [m.generate("To be", max_tokens=50) for _ in range(999)], daemon=True).start()
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if m.generate("To be", max_tokens=5).text == right else 1)
    assert os.waitpid(pid, 0)[1] == 0
"""
NO_MORE_THREADS = """
m = model()
real = threading.Thread.start
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
alone = m.generate("To be", max_tokens=5).text
threading.Thread.start = real
assert m.generate("To be", max_tokens=5).text == alone
"""

NUMPY_COMPUTES_WHILE_A_THREAD_COMPILES = """
from gpt_xp_backends.native_backend import machine, step
step.PATIENCE, runs, run = 0, [], step.TracedStep.run
step.TracedStep.run = lambda *args: (runs.append(1), run(*args))[1]
for options in ({}, {"dtype": "float16"}):
    m = gpt_xp.load("shakespeare", backend="native", **options)
    right = gpt_xp.load("shakespeare", backend="numpy").generate("To be", max_tokens=9).text
    m.backend._runner.tracing._is_cold = True  # also the second time
    before = len(runs)
    with machine.alone():  # The thread cannot compile yet.
        assert m.generate("To be", max_tokens=9).text == right
    assert len(runs) == before
    while m.backend._runner.tracing._coming:
        time.sleep(0.01)
        assert m.generate("To be", max_tokens=9).text == right
    assert len(runs) > before
"""


@posix
@pytest.mark.parametrize(
    "code", [NUMPY_COMPUTES_WHILE_A_THREAD_COMPILES, CTRL_C, FIRST_USE_AT_ONCE, FORK_WHILE_COMPUTING, NO_MORE_THREADS]
)
def test_it_goes_on(code: str, tmp_path: Path) -> None:
    make_backend("native")
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}  # Kernels are compiled while it is in trouble.
    subprocess.run([sys.executable, "-W", "ignore", "-c", MODEL + code], check=True, timeout=PATIENCE, env=variables)


# --- the command ------------------------------------------------------------------------------------------------------


def test_stats_name_native_where_it_is_installed(call: Callable[..., Result]) -> None:
    make_backend("native")
    found = {name: call("-m", "shakespeare", "-b", name, "--stats", "-n", "2", "A").err for name in ("numpy", "native")}
    assert "; faster here: --backend native\n" in found["numpy"]
    assert "faster here" not in found["native"]
    assert re.search(r"; packing \d\.\d\d s;", found["native"])
    assert "packing" not in found["numpy"]


# --- functions that the model does not have ---------------------------------------------------------------------------


def _shifted(x: Any, y: Any, tokens: Any, xp: Any) -> Any:
    numbers = xp.astype(xp.arange(31, dtype=xp.int32), xp.float32)
    return x + xp.reshape(xp.take(numbers, xp.reshape((tokens + 1) % 31, (-1,)), axis=0), (1, 3, 1))


def _twice(x: Any, y: Any, tokens: Any, xp: Any) -> Any:
    e = xp.exp(y)
    return e + e


OTHER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "operators on the tokens": _shifted,
    "a view that must copy": lambda x, y, tokens, xp: xp.reshape(xp.permute_dims(x * 2.0, (2, 0, 1)), (-1,)),
    "value number 1 twice": _twice,
    "value number 1, and the number 1": lambda x, y, tokens, xp: xp.exp(y) + 1.0,
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_any_function_of_a_step_is_numpys_at_every_run(native: Backend, name: str) -> None:
    """Nothing of the first run may stay in the tape, and nothing is read before it is computed."""

    def function(params: Any, tokens: Any, cache: Any, config: Any, xp: Any) -> Any:
        x, after = hidden_states(params, tokens, config, cache, xp)
        y = xp.matmul(xp.reshape(x, (-1, LONG.n_embd)), params["blocks"][0]["attn"]["c_proj"]["w"])
        return OTHER_FUNCTIONS[name](x, y, tokens, xp), after

    results = []
    for backend in (native, get_backend("numpy")):
        model, found = long_model(backend), []
        step = backend.compile(function, static=("config", "xp"), donate=("cache",))
        for row in ([3, 1, 4], [7, 30, 9]):
            cache = backend.new_cache(LONG, model.params["wpe"], 128, np.zeros(1, np.int32))
            found.append(step(model.params, np.array([row], np.int32), cache, config=LONG, xp=backend.xp)[0])
        results.append(found)
    for ours, expected in zip(*results, strict=True):
        assert_values(ours, expected, TOLERANCE["logits", "float32"])
