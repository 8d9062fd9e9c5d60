"""Quantized weights: against float64 arithmetic on the weights that they stand for, on every backend."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Result
from comparison import assert_values
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend, quantized, skipping_what_is_missing
from naive_gpt2 import gpt2 as naive_gpt2
from small_models import CONFIGS, small_tokens
from small_quantized import KINDS, decode, float32_params, float64_of, small

import gpt_xp
from gpt_xp import Backend, Model, transformer
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_carried, stated_quantization
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError, GptXpError, NumericalError, SettingError
from gpt_xp.generation import decoder
from gpt_xp.installation import install_command
from gpt_xp.quantization import GROUP, Quantized, QuantizedWeight, _quantized, quantization_of
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.tree import leaves

N_TOKENS = 13  # one program of JAX for these and for one


def test_import_of_numba_is_not_on_spec() -> None:
    import subprocess
    import sys

    code = "import gpt_xp, sys; gpt_xp.load(backend='numpy'); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


# Quantizing.


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7), groups=st.integers(1, 3), log=st.integers(-44, 37), seed=st.integers(0, 99),
    zero=st.booleans(), kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_no_weight_is_off_by_more_than_half_a_step(
    rows: int, groups: int, log: int, seed: int, zero: bool, kind: str
) -> None:
    columns = groups * GROUP + (5 if kind == "int8" else 0)
    weights = (np.random.RandomState(seed).standard_normal((rows, columns)) * 10.0**log).astype(np.float32)
    if zero:
        weights[0] = 0
    q, scale = _quantized(weights, kind)
    steps = np.abs(scale.astype(np.float64))
    each = steps[:, None] if kind == "int8" else np.repeat(steps, GROUP, axis=1)
    error = np.abs(decode(q, scale.astype(np.float64)) - weights)
    # int4 has no code 8: the opposite of its largest number is cut to 7 steps, and off by up to a whole one.
    assert (error <= (0.5 if kind == "int8" else 1.0) * 1.001 * each).all()
    if zero:
        assert (decode(q, scale)[0] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    params = float32_params("prime")
    params["blocks"][1]["mlp"]["c_fc"]["w"][3, 5] = value
    with pytest.raises(NumericalError, match="not finite"):
        gpt_xp.quantize(params, "int8")


def test_what_cannot_be_quantized_so_is_refused() -> None:
    with pytest.raises(SettingError, match="int8, int4"):
        gpt_xp.quantize(float32_params("prime"), "int3")
    with pytest.raises(SettingError, match="take int8"):
        gpt_xp.quantize(float32_params("prime"), "int4")
    quantized = gpt_xp.quantize(float32_params("124M-ratios"), "int8")
    assert gpt_xp.quantize(quantized, "int8") is quantized
    with pytest.raises(SettingError, match="int8 already"):
        gpt_xp.quantize(quantized, "int4")


# Computing.


def assert_logits(model: Model, params: Any, tolerance: float) -> None:
    """Compare all logits of some tokens, and those of one token, with the oracle's."""
    tokens = small_tokens("prime")[0, :N_TOKENS]
    expected = naive_gpt2(tokens, **float64_of(params), n_head=model.config.n_head)
    assert_values(model.logits(tokens), expected, tolerance)
    assert_values(model.logits(tokens[:1]), expected[:1], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_that_are_meant(kind: str, backend: Backend) -> None:
    params, config = small(kind)
    model = Model(params, config, backend=quantized(backend))
    assert_logits(model, params, TOLERANCE["logits", "float32"])
    again = Model(params, config, backend=model.backend)  # a backend that knows quantized weights already
    assert again.backend is model.backend


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_with_quantized_weights(kind: str, dtype: str) -> None:
    params, config = small(kind)
    model = Model(params, config, backend=make_backend("torch", dtype))
    assert_logits(model, params, TOLERANCE["logits", dtype])


def test_one_token_at_a_time_is_the_whole_text(backend: Backend) -> None:
    params, config = small("int8")
    model = Model(params, config, backend=quantized(backend))
    batch = [[5, 3, 17, 2], [7], [11, 1, 30]]
    for prompt, row in zip(batch, model.generate(batch, max_tokens=6, ignore_eos=True), strict=True):
        logits = naive_gpt2(prompt + row.token_ids, **float64_of(params), n_head=config.n_head)[len(prompt) - 1 : -1]
        second, best = np.sort(logits, axis=-1)[:, -2:].T
        clear = best - second > 1e-4 * np.abs(logits).max()
        assert clear.sum() > 3
        assert (logits.argmax(axis=-1) == row.token_ids)[clear].all()
        assert row.stats.quantize == "int8"


def test_models_of_one_shape_share_the_programs_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    params, config = small("int8")
    traced: list[tuple[int, ...]] = []
    original = decoder.next_token_logits

    def spy(params: Any, tokens: Any, cache: Any, count: Any, config: Any, xp: Any) -> Any:
        traced.append(tokens.shape)
        return original(params, tokens, cache, count, config, xp)

    monkeypatch.setattr(decoder, "next_token_logits", spy)
    Model(params, config, backend=make_backend("jax")).generate([5, 3], max_tokens=3, ignore_eos=True)
    assert len(traced) == 2  # prefill and decode
    Model(params, config, backend=make_backend("jax")).generate([7, 2], max_tokens=3, ignore_eos=True)
    assert len(traced) == 2, "compiled again for a second model"


# NumPy's kernels.


@pytest.mark.parametrize("n_out", [1, 2, 5, 37])
@pytest.mark.parametrize(("kind", "n_in"), [("int8", 7), ("int8", 1056), ("int4", 32), ("int4", 1056)])
def test_kernels_of_numpy_for_any_shape(monkeypatch: pytest.MonkeyPatch, kind: str, n_in: int, n_out: int) -> None:
    quantized(make_backend("numpy"))
    from gpt_xp_backends import numpy_quantized
    from gpt_xp_backends.numpy_quantized import linear, product

    monkeypatch.setattr(numpy_quantized, "MAX_DEQUANTIZED_COLUMNS", 5)
    xp = quantized(make_backend("numpy")).xp.without("linear")
    random = np.random.RandomState(n_in + n_out)
    bias = random.standard_normal(2 * n_out).astype(np.float32)[::2]
    weight = QuantizedWeight(*_quantized(random.standard_normal((n_out, n_in)).astype(np.float32), kind))
    meant = decode(weight.q, weight.scale.astype(np.float64)).T
    for array in weight:
        array.flags.writeable = False  # as it is when it is mapped from a file
    for rows in (1, 2, 4, 5, 8, 13, 95, 96, 101):
        x = random.standard_normal((rows, 2 * n_in)).astype(np.float32)[:, ::2]
        found = product(x, weight)
        assert (found.shape, found.dtype) == ((rows, n_out), np.float32)
        assert_values(found, x.astype(np.float64) @ meant, TOLERANCE["logits", "float32"])
        found = linear(x, weight, bias, xp)
        assert (found.shape, found.dtype) == ((rows, n_out), np.float32)
        assert_values(found, x.astype(np.float64) @ meant + bias.astype(np.float64), TOLERANCE["logits", "float32"])


def test_threads_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(make_backend("numpy"))
    import numba
    import threadpoolctl
    from gpt_xp_backends import numpy_quantized

    seen: list[tuple[int, int]] = []
    original = numpy_quantized.product

    def spy(x: Any, weight: Any, *bias: Any) -> Any:
        blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        seen.append((numba.get_num_threads(), max(blas, default=1)))
        return original(x, weight, *bias)

    monkeypatch.setattr(numpy_quantized, "product", spy)
    params, config = small("int8")
    before = numba.get_num_threads()
    for threads, expected in ((1, 1), (None, before), (10**6, numba.config.NUMBA_NUM_THREADS)):
        seen.clear()
        backend = get_backend("numpy", threads=threads)
        Model(params, config, backend=backend).logits([5, 3])
        assert set(seen) == {(expected, 1)}  # and BLAS has one thread
        assert numba.get_num_threads() == before


def test_kernels_are_compiled_where_no_folder_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(make_backend("numpy"))
    from gpt_xp_backends import numpy_kernels
    from numba.core.caching import _CacheLocator

    def refuse(locator: Any) -> None:
        raise PermissionError("no folder can be written to")

    monkeypatch.setattr(_CacheLocator, "ensure_cache_path", refuse)
    kernel = numpy_kernels.product_kernel.__wrapped__("int8", "few")
    x, out = np.array([[2, 3, 5]], np.float32), np.empty((1, 2), np.float32)
    scale, bias = np.array([[1, 0.5], [17, 19]], np.float32)
    kernel(x, np.array([[7, 11, 13], [-1, 0, 1]], np.int8), scale, bias, out, 1)
    assert out.tolist() == [[129, 20.5]]


def test_float64_stays_float64() -> None:
    params, config = small("int8")
    model = Model(params, config, backend=make_backend("numpy", "float64"))
    assert_logits(model, params, TOLERANCE["logits", "float64"])


# Saving and loading.


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    params, config = small(request.param)
    checkpoint.save(tmp_path, params, config)
    return SimpleNamespace(kind=request.param, config=config, params=params, directory=tmp_path)


def test_what_is_saved_is_what_is_read(saved: SimpleNamespace) -> None:
    found = read_params(saved.directory, saved.config, None, stated_quantization(read_carried(saved.directory)))
    for before, after in zip(leaves(saved.params), leaves(found), strict=True):
        assert type(before) is type(after) or isinstance(after, np.ndarray)
        for a, b in zip(*((leaf if isinstance(leaf, Quantized) else [leaf]) for leaf in (before, after)), strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_a_damaged_quantized_checkpoint_is_refused(saved: SimpleNamespace) -> None:
    other = {"int8": "int4", "int4": "int8"}[saved.kind]
    for wrong in (None, other):
        with pytest.raises(GptXpError, match=r"do not fit the config|int4 needs widths"):
            read_params(saved.directory, saved.config, None, wrong)
    params = dict(saved.params)
    params["wte"] = params["wte"]._replace(scale=params["wte"].scale[:-1])
    with pytest.raises(CheckpointError, match="wte_scale is"):
        checkpoint.save(saved.directory, params, saved.config)


def test_the_config_of_another_quantization_is_refused(saved: SimpleNamespace) -> None:
    path = saved.directory / "config.json"
    entries = json.loads(path.read_text())
    assert entries["quantization_config"] == {"quant_method": "gpt-xp", "weights": saved.kind}
    path.write_text(json.dumps(entries | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ConfigError, match="quantize it by gpt-xp"):
        stated_quantization(read_carried(saved.directory))


def test_a_loaded_model_is_saved_and_loaded_again(backend: Backend, tmp_path: Path) -> None:
    model = gpt_xp.load("shakespeare", backend=quantized(backend), quantize="int8")
    model.save(tmp_path)
    again = gpt_xp.load(tmp_path, backend=backend)
    ids = model.tokenizer.encode("ROMEO:")
    assert np.array_equal(model.logits(ids), again.logits(ids))
    assert quantization_of(gpt_xp.load(tmp_path, backend=backend, quantize="int8").params) == "int8"
    with pytest.raises(SettingError, match="int8 already"):
        gpt_xp.load(tmp_path, backend=backend, quantize="int4")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "GPT2LMHeadModel"])
def test_transformers_refuses_what_it_cannot_read(saved: SimpleNamespace, name: str) -> None:
    import transformers

    with pytest.raises(RuntimeError, match="mismatch"):
        getattr(transformers, name).from_pretrained(saved.directory)


# The command, and what is missing.


def test_the_command_says_what_ran(no_variables: None, call: Callable[..., Result]) -> None:
    quantized(make_backend("numpy"))
    result = call("--model", "shakespeare", "-n", "3", "--stats", "ROMEO:", GPT_XP_QUANTIZE="int8")
    assert result.code == 0, result.err
    assert "float32, int8;" in result.err
    record = json.loads(call("--model", "shakespeare", "-n", "3", "--json", "--quantize", "int4", "ROMEO:").out)
    assert record["quantize"] == "int4"


@pytest.mark.parametrize("n_slots", [1, 4, 23, 41])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_beside_quantized_weights(batch: int, n_slots: int) -> None:
    """Numba computes the attention of one query of each head, NumPy all other."""
    with skipping_what_is_missing("numba"):
        numpy_quantized = importlib.import_module("gpt_xp_backends.numpy_quantized")
    by_numpy: list[int] = []

    def in_blocks(*args: Any) -> Any:
        by_numpy.append(1)
        return transformer.attention(*args)

    def check(*args: Any) -> bool:
        """Compare with float64, and return whether NumPy computed it."""
        by_numpy.clear()
        found = numpy_quantized.attention(in_blocks, *args, xp=np)
        expected = transformer.attention(*(each.astype(np.float64) for each in args), xp=np)
        assert (found.shape, found.dtype) == (expected.shape, args[2].dtype)
        assert np.abs(found - expected).max() <= TOLERANCE["same", "float32"] * np.abs(args[2]).max()
        return bool(by_numpy)

    random = np.random.RandomState(n_slots)
    q = random.standard_normal((7, batch, 1, 13)).astype(np.float32).swapaxes(0, 1)  # as permuted heads lie
    k, v = random.standard_normal((2, batch, 7, n_slots, 13)).astype(np.float32)
    mask = np.zeros((batch, 1, 1, n_slots), np.float32)
    for row in range(batch):
        mask[row, ..., : row * n_slots // 4] = np.finfo(np.float32).min  # padding

    def within(x: Any, first: int) -> Any:
        """Return slots from `first` on of an array whose other slots must not be read."""
        room = np.full((batch * 7, n_slots + 5, 13), np.nan, np.float32)
        part = room[:, first : first + n_slots].reshape(x.shape)
        part[:] = x
        assert np.shares_memory(part, room)
        return part

    assert not check(q, k, v, mask)
    assert not check(q, within(k, 0), within(v, 0), mask), "the first slots, as of a cache that has grown"
    assert not check(q, within(k, 2), v[:, ::-1].copy()[:, ::-1], mask), "in other orders"
    assert not check(q, np.concatenate([k, k], axis=3)[..., :13], np.asfortranarray(v), mask)
    assert not check(q * 1000, k, v, mask), "scores too large for their exponentials"
    # What is no query of one token, and no float32, is NumPy's.
    assert check(np.concatenate([q, q], axis=2), k, v, mask)
    assert check(q.astype(np.float64), k, v, mask)
    assert check(q, k.astype(np.float64), v, mask)
    assert check(q[0, 0], k[0, 0], v[0, 0], mask[0, 0])
    assert check(q, k, v, mask[:1]) == (batch > 1)


def test_layer_norm_beside_quantized_weights() -> None:
    with skipping_what_is_missing("numba"):
        layer_norm = importlib.import_module("gpt_xp_backends.numpy_quantized").layer_norm
    random = np.random.RandomState(3)
    x, g, b = (random.standard_normal(shape) for shape in ((5, 26), (13,), (13,)))
    for dtype in (np.float32, np.float64):
        for rows in (x[:, ::2], x[:1, 13:], x[:, :13] + 100, x[:0, :13], x[:, 13:][None], x[0, :13]):
            args = rows.astype(dtype), g.astype(dtype), b.astype(dtype)
            found = layer_norm(*args, xp=np, eps=0.01)
            expected = transformer.layer_norm(*(each.astype(np.float64) for each in args), xp=np, eps=0.01)
            assert (found.shape, found.dtype) == (rows.shape, dtype)
            # A mean of 100 takes two digits of float32 from numbers around 1.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if dtype == np.float32 else 1e-12)
    with pytest.raises(ValueError, match="broadcast"):
        layer_norm(x.astype(np.float32), g.astype(np.float32), b.astype(np.float32), xp=np)


def test_without_numba_numpy_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(gpt_xp.errors.BackendError, match=re.escape(install_command("quantize"))):
        gpt_xp.load("shakespeare", backend="numpy", quantize="int8")


def test_shapes_are_those_of_the_weights() -> None:
    config: GPT2Config = CONFIGS["prime"]
    shapes = gpt_xp.shape_tree(gpt_xp.quantize(float32_params("prime"), "int8"))
    assert shapes == gpt_xp.shape_tree(float32_params("prime"))
    assert shapes["wte"] == [config.n_vocab, config.n_embd]
