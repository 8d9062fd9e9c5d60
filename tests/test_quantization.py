"""Quantized weights: against float64 arithmetic on the weights that they stand for, on every backend."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import Result
from comparison import assert_values
from conftest import make_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_gpt2 import gpt2 as naive_gpt2
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Backend, Model
from gpt_xp._tree import leaves, tree_map
from gpt_xp.checkpoint import read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError, GptXpError, NumericalError, SettingError
from gpt_xp.quantization import GROUP, Quantized, QuantizedTable, QuantizedWeight, _quantized
from gpt_xp.tolerances import TOLERANCE

NAMES = {"int8": "prime", "int4": "124M-ratios"}  # int4 wants a width of whole groups
KINDS = sorted(NAMES)


def float32_params(name: str) -> Any:
    return tree_map(lambda leaf: leaf.astype(np.float32), small_params(name))


def float64_of(params: Any) -> Any:
    """The weights that quantized params stand for."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return np.asarray(leaf, np.float64)
        table = decode(np.asarray(leaf.q), np.asarray(leaf.scale, np.float64))
        return table if isinstance(leaf, QuantizedTable) else table.T

    return tree_map(widen, params)


def decode(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """One code at a time, from the description of the format."""
    if q.dtype == np.int8:
        return np.array([[float(code) * s for code in row] for row, s in zip(q, scale, strict=True)])
    table = np.zeros((len(q), 2 * q.shape[1]))
    for i, j in np.ndindex(q.shape):
        group, place = divmod(j, 16)
        table[i, 32 * group + place] = (int(q[i, j]) % 16 - 8) * scale[i, group]
        table[i, 32 * group + 16 + place] = (int(q[i, j]) // 16 - 8) * scale[i, group]
    return table


def test_import_of_numba_is_not_on_spec() -> None:
    import subprocess
    import sys

    code = "import gpt_xp, sys; gpt_xp.load(backend='numpy'); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_that_are_meant(kind: str, backend: Backend) -> None:
    config, tokens = CONFIGS[NAMES[kind]], small_tokens(NAMES[kind])[0]
    params = gpt_xp.quantize(float32_params(NAMES[kind]), kind)
    expected = naive_gpt2(tokens, **float64_of(params), n_head=config.n_head)
    model = Model(params, config, backend=backend)
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float32"])
    assert_values(model.logits(tokens[:1]), expected[:1], TOLERANCE["logits", "float32"])
    again = Model(params, config, backend=model.backend)  # a backend that knows quantized weights already
    assert_values(again.logits(tokens), expected, TOLERANCE["logits", "float32"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time_is_the_whole_text(kind: str, backend: Backend) -> None:
    config = CONFIGS[NAMES[kind]]
    model = Model(gpt_xp.quantize(float32_params(NAMES[kind]), kind), config, backend=backend)
    batch = [[5, 3, 17, 2], [7], [11, 1, 30]]
    for prompt, row in zip(batch, model.generate(batch, max_tokens=6, ignore_eos=True), strict=True):
        ids = prompt + row.token_ids
        best = np.sort(model.logits(ids), axis=-1)
        chosen = model.logits(ids).argmax(axis=-1)[len(prompt) - 1 : -1]
        clear = (best[:, -1] - best[:, -2] > 1e-4 * np.abs(best).max())[len(prompt) - 1 : -1]
        assert clear.sum() > 3
        assert (chosen == row.token_ids)[clear].all()
        assert row.stats.quantize == kind


@pytest.mark.parametrize("n_out", [1, 2, 5, 37])
@pytest.mark.parametrize("n_in", [7, 32, 1056])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_numpy_for_any_shape(kind: str, n_in: int, n_out: int) -> None:
    if kind == "int4" and n_in % GROUP:
        pytest.skip(f"int4 has no width of {n_in}")
    pytest.importorskip("numba", reason="numba is not installed: pip install 'gpt-xp[quantize]'")
    from gpt_xp_backends.numpy_kernels import product

    random = np.random.RandomState(n_in + n_out)
    weight = QuantizedWeight(*_quantized(random.standard_normal((n_out, n_in)).astype(np.float32), kind))
    meant = decode(weight.q, weight.scale.astype(np.float64)).T
    for array in weight:
        array.flags.writeable = False  # as it is when it is mapped from a file
    for rows in (1, 2, 4, 5, 8, 13):
        x = random.standard_normal((rows, 2 * n_in)).astype(np.float32)[:, ::2]
        assert_values(product(x, weight), x.astype(np.float64) @ meant, TOLERANCE["logits", "float32"])


def test_float64_stays_float64() -> None:
    params = gpt_xp.quantize(float32_params("prime"), "int8")
    tokens = small_tokens("prime")[0]
    model = Model(params, CONFIGS["prime"], backend=make_backend("numpy", "float64"))
    expected = naive_gpt2(tokens, **float64_of(params), n_head=CONFIGS["prime"].n_head)
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float64"])


# Saving and loading.


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    kind, config = request.param, CONFIGS[NAMES[request.param]]
    params = gpt_xp.quantize(float32_params(NAMES[kind]), kind)
    gpt_xp.checkpoint.save_checkpoint(tmp_path, params, config)
    return SimpleNamespace(kind=kind, config=config, params=params, directory=tmp_path)


def test_what_is_saved_is_what_is_read(saved: SimpleNamespace) -> None:
    found = read_params(saved.directory, saved.config, None, gpt_xp.checkpoint.read_quantization(saved.directory))
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
        gpt_xp.checkpoint.save_checkpoint(saved.directory, params, saved.config)


def test_the_config_of_another_quantization_is_refused(saved: SimpleNamespace) -> None:
    path = saved.directory / "config.json"
    entries = json.loads(path.read_text())
    assert entries["quantization_config"] == {"quant_method": "gpt-xp", "weights": saved.kind}
    path.write_text(json.dumps(entries | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ConfigError, match="quantize it by gpt-xp"):
        gpt_xp.checkpoint.read_quantization(saved.directory)


def test_a_loaded_model_is_saved_and_loaded_again(backend: Backend, tmp_path: Path) -> None:
    model = gpt_xp.load("shakespeare", backend=backend, quantize="int8")
    model.save(tmp_path)
    again = gpt_xp.load(tmp_path, backend=backend)
    ids = model.tokenizer.encode("ROMEO:")
    assert np.array_equal(model.logits(ids), again.logits(ids))
    assert gpt_xp.load(tmp_path, backend=backend, quantize="int8").generate("ROMEO:", max_tokens=1).stats.quantize
    with pytest.raises(SettingError, match="int8 already"):
        gpt_xp.load(tmp_path, backend=backend, quantize="int4")


# The command, and what is missing.


def test_the_command_says_what_ran(no_variables: None, call: Callable[..., Result]) -> None:
    make_backend("numpy")
    result = call("--model", "shakespeare", "-n", "3", "--stats", "ROMEO:", GPT_XP_QUANTIZE="int8")
    assert result.code == 0, result.err
    assert "float32, int8;" in result.err
    record = json.loads(call("--model", "shakespeare", "-n", "3", "--json", "--quantize", "int4", "ROMEO:").out)
    assert record["stats"]["quantize"] == "int4"


def test_without_numba_numpy_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(gpt_xp.errors.BackendError, match=r"pip install 'gpt-xp\[quantize\]'"):
        gpt_xp.load("shakespeare", backend="numpy", quantize="int8")


def test_shapes_are_those_of_the_weights() -> None:
    config: GPT2Config = CONFIGS["prime"]
    shapes = gpt_xp.shape_tree(gpt_xp.quantize(float32_params("prime"), "int8"))
    assert shapes == gpt_xp.shape_tree(float32_params("prime"))
    assert shapes["wte"] == [config.n_vocab, config.n_embd]
