"""The mathematics, on every backend, against transformers in float64 (goldens) and against published formulas."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
from comparison import TOLERANCE, assert_close, assert_values, xp_of
from libraries import make_backend
from small_models import CONFIGS, GOLDENS, leaves, small_params, small_tokens, tree_map

import gpt_xp
from gpt_xp import Backend
from gpt_xp import transformer as model
from gpt_xp.errors import ConfigError, PromptError


def on(backend: Backend, params: Any) -> Any:
    return tree_map(lambda leaf: backend.asarray(leaf, backend.dtype), params)


def compiled(backend: Backend, function: Any) -> Any:
    """The function as the backend runs it: jitted on JAX, where eager code compiles each operation by itself."""
    return functools.partial(backend.compile(function, static=("config", "xp")), xp=backend.xp)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(backend: Backend, name: str) -> None:
    tokens = backend.asarray(small_tokens(name))
    logits = compiled(backend, gpt_xp.gpt2)(on(backend, small_params(name)), tokens, CONFIGS[name])
    assert_close(logits[:, ::3, ...], GOLDENS[f"{name}/logits"], backend, "logits")


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_logits_are_those_of_transformers(name: str) -> None:
    backend = make_backend("numpy", "float64")
    logits = gpt_xp.gpt2(small_params(name), small_tokens(name), CONFIGS[name])
    assert_close(logits[:, ::3], GOLDENS[f"{name}/logits"], backend, "logits")


@pytest.mark.parametrize("name", ["jax", "torch", "array-api-strict"])
def test_float64_on_other_backends(name: str) -> None:
    backend = make_backend(name, "float64")
    logits = gpt_xp.Model(small_params("prime"), CONFIGS["prime"], backend=backend).logits(small_tokens("prime"))
    assert logits.dtype == np.float64
    assert_values(logits[:, ::3], GOLDENS["prime/logits"], TOLERANCE["logits", "float64"])


HALVES = [("jax:gpu", "bfloat16"), ("jax:gpu", "float16"), ("cupy", "float16")]
HALVES += [("torch:cuda", "bfloat16"), ("torch:cuda", "float16")]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(("torch", "mlx"), ("bfloat16", "float16")),
        *(pytest.param(*half, marks=pytest.mark.gpu) for half in HALVES),
    ],
)
@pytest.mark.parametrize("shape", ["124M-ratios", "planted"])
def test_half_precision(name: str, dtype: str, shape: str) -> None:
    backend = make_backend(name, dtype)
    logits = gpt_xp.Model(small_params(shape), CONFIGS[shape], backend=backend).logits(small_tokens(shape))
    assert logits.dtype == np.float32
    assert_values(logits[:, ::3], GOLDENS[f"{shape}/logits"], TOLERANCE["logits", dtype])


def test_the_planted_model_has_large_activations() -> None:
    config, params, tokens = CONFIGS["planted"], small_params("planted"), small_tokens("planted")
    stream = []
    original = model.transformer_block

    def spy(x: Any, *args: Any, **kwargs: Any) -> Any:
        stream.append(float(np.abs(x).max()))
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "transformer_block", spy)
        gpt_xp.gpt2(params, tokens, config)
    assert stream[0] < 10
    assert stream[1] > 2500


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_that_of_transformers(backend: Backend, name: str) -> None:
    tokens = backend.asarray(small_tokens(name))
    loss = compiled(backend, gpt_xp.lm_loss)(on(backend, small_params(name)), tokens, config=CONFIGS[name])
    assert_close(loss, GOLDENS[f"{name}/loss"], backend, "logits")


def test_one_row_without_a_batch(backend: Backend) -> None:
    config, params, tokens = CONFIGS["prime"], on(backend, small_params("prime")), small_tokens("prime")
    single = gpt_xp.gpt2(params, backend.asarray(tokens[1]), config, xp=xp_of(backend))
    batch = gpt_xp.gpt2(params, backend.asarray(tokens), config, xp=xp_of(backend))
    assert_close(single, backend.to_numpy(batch)[1], backend, "same")


def test_hidden_states_stop_before_the_vocabulary(backend: Backend) -> None:
    config, params, tokens = CONFIGS["prime"], on(backend, small_params("prime")), small_tokens("prime")
    x, cache = gpt_xp.hidden_states(params, backend.asarray(tokens), config, xp=xp_of(backend))
    assert cache is None
    assert x.shape == (*tokens.shape, config.n_embd)
    last = gpt_xp.unembed(x[:, -1, :], params["wte"], xp=xp_of(backend))
    full = gpt_xp.gpt2(params, backend.asarray(tokens), config, xp=xp_of(backend))
    assert_close(last, backend.to_numpy(full)[:, -1], backend, "same")


def test_a_token_sees_no_later_token(backend: Backend) -> None:
    config, params, tokens = CONFIGS["prime"], on(backend, small_params("prime")), small_tokens("prime")
    changed = tokens.copy()
    changed[:, 17:] = (changed[:, 17:] + 1) % config.n_vocab
    before, after = (
        backend.to_numpy(gpt_xp.gpt2(params, backend.asarray(ids), config, xp=xp_of(backend)))
        for ids in (tokens, changed)
    )
    assert_values(after[:, :17], before[:, :17], TOLERANCE["same", "float32"])
    assert np.abs(after[:, 17:] - before[:, 17:]).min(axis=-1).max() > 0


def test_too_many_tokens_are_refused(backend: Backend) -> None:
    config, params = CONFIGS["prime"], on(backend, small_params("prime"))
    with pytest.raises(PromptError, match="38 tokens were given, and this model takes 1 to 37"):
        gpt_xp.gpt2(params, backend.asarray(np.zeros((1, 38), dtype=np.int32)), config, xp=xp_of(backend))


# Arguments of another kind.


def test_what_is_no_array_of_tokens_is_refused(backend: Backend) -> None:
    config, params, xp = CONFIGS["prime"], on(backend, small_params("prime")), xp_of(backend)
    several_axes = [backend.asarray(np.zeros(shape, dtype=np.int32)) for shape in ((), (1, 1, 3))]
    for tokens in ([1, 2, 3], "To be", None, backend.asarray(np.ones(3), "float32"), *several_axes):
        for function in (gpt_xp.gpt2, gpt_xp.hidden_states, gpt_xp.lm_loss):
            with pytest.raises(PromptError, match="tokens must be an array of whole numbers"):
                function(params, tokens, config, xp=xp)


def test_what_is_no_config_or_no_params_is_refused(backend: Backend) -> None:
    config, params, xp = CONFIGS["prime"], on(backend, small_params("prime")), xp_of(backend)
    tokens = backend.asarray(small_tokens("prime"))
    for function in (gpt_xp.gpt2, gpt_xp.hidden_states, gpt_xp.lm_loss):
        with pytest.raises(ConfigError, match=r"config must be a gpt_xp.GPT2Config, not dict: make one by"):
            function(params, tokens, dataclasses.asdict(config), xp=xp)
        for wrong in (None, [params], {"wpe": 1}, config):
            with pytest.raises(ConfigError, match="params must be a dict of arrays with wte, wpe, blocks and ln_f"):
                function(wrong, tokens, config, xp=xp)
    with pytest.raises(ConfigError, match="config must be"):
        gpt_xp.Model(params, dataclasses.asdict(config), backend=backend)


def test_tokens_of_another_library_are_refused(jax_params: Any) -> None:
    with pytest.raises(PromptError, match=r"of the same library as the params, not numpy.ndarray int32 beside .*jax"):
        gpt_xp.gpt2(jax_params, small_tokens("prime"), CONFIGS["prime"])


# One function at a time, against its published formula in float64.


def test_gelu(backend: Backend) -> None:
    x = np.linspace(-7, 7, 211)
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    assert_close(model.gelu(backend.asarray(x, "float32"), backend.xp), np.array(expected), backend, "function")
    # Hendrycks & Gimpel 2016: x * Phi(x), which the tanh form meets to three digits.
    exact = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert 1e-5 < np.abs(np.array(expected) - exact).max() < 1e-3


def test_softmax(backend: Backend) -> None:
    x = np.random.RandomState(0).standard_normal((3, 5, 7)) * 300  # exp would overflow without the maximum
    expected = np.exp(x - x.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    assert_close(model.softmax(backend.asarray(x, "float32"), backend.xp), expected, backend, "gradient", "float32")


def test_layer_norm(backend: Backend) -> None:
    random = np.random.RandomState(1)
    x, g, b = random.standard_normal((3, 5, 7)) * 2 + 1, random.standard_normal(7), random.standard_normal(7)
    deviation = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-5)
    expected = (x - x.mean(-1, keepdims=True)) / deviation * g + b
    actual = model.layer_norm(*(backend.asarray(a, "float32") for a in (x, g, b)), xp=backend.xp)
    assert_close(actual, expected, backend, "function")


def test_layer_norm_of_a_constant_is_its_shift(backend: Backend) -> None:
    # Powers of two, so that their mean is exact and no rounding error is blown up by the division.
    x, g, b = np.full((2, 8), 4.0), np.ones(8), np.arange(8.0)
    actual = model.layer_norm(*(backend.asarray(a, "float32") for a in (x, g, b)), xp=backend.xp)
    assert_close(actual, np.stack([b, b]), backend, "function")


def test_attention_that_may_look_nowhere_is_finite(backend: Backend) -> None:
    q, k, v = (backend.asarray(np.ones((3, 5)), "float32") for _ in range(3))
    mask = backend.asarray(np.full((3, 3), np.finfo(np.float32).min), "float32")
    assert_close(model.attention(q, k, v, mask, backend.xp), np.ones((3, 5)), backend, "function")


# JAX's transformations, on the functions as they stand.


@pytest.fixture
def jax_params() -> Any:
    return on(make_backend("jax"), small_params("prime"))


def test_jit_is_eager(jax_params: Any) -> None:
    import jax

    config, tokens = CONFIGS["prime"], small_tokens("prime")
    jitted = jax.jit(gpt_xp.gpt2, static_argnames="config")
    eager = np.asarray(gpt_xp.gpt2(jax_params, jax.numpy.asarray(tokens), config))
    assert_close(jitted(jax_params, tokens, config), eager, make_backend("jax"), "same")


def test_jit_with_a_cache(jax_params: Any) -> None:
    import jax

    config, tokens = CONFIGS["prime"], small_tokens("prime")
    jitted = jax.jit(gpt_xp.gpt2_with_cache, static_argnames="config")
    cache = gpt_xp.new_cache(config, jax_params["wte"], 37, jax.numpy.zeros(3, dtype="int32"), jax.numpy)
    for begin in range(0, 30, 5):
        logits, cache = jitted(jax_params, tokens[:, begin : begin + 5], config, cache=cache)
    full = gpt_xp.gpt2(jax_params, jax.numpy.asarray(tokens[:, :30]), config)
    assert_close(logits, np.asarray(full)[:, 25:], make_backend("jax"), "same")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_that_of_torch(name: str) -> None:
    backend = make_backend("jax")
    import jax

    step = jax.jit(jax.value_and_grad(gpt_xp.lm_loss), static_argnums=2)
    loss, gradient = step(on(backend, small_params(name)), jax.numpy.asarray(small_tokens(name)), CONFIGS[name])
    assert_close(loss, GOLDENS[f"{name}/loss"], backend, "logits")
    c_attn = gradient["blocks"][0]["attn"]["c_attn"]["w"]
    assert_close(c_attn[:, ::3], GOLDENS[f"{name}/gradient"], backend, "gradient")
    assert all(np.isfinite(leaf).all() for leaf in leaves(gradient))


def test_gradient_on_mlx_is_that_of_torch() -> None:
    backend = make_backend("mlx")
    import mlx.core as mx

    def loss_of(params: Any) -> Any:
        return gpt_xp.lm_loss(params, backend.asarray(small_tokens("prime")), CONFIGS["prime"], xp=backend.xp)

    loss, gradient = mx.value_and_grad(loss_of)(on(backend, small_params("prime")))
    assert_close(loss, GOLDENS["prime/loss"], backend, "logits")
    c_attn = gradient["blocks"][0]["attn"]["c_attn"]["w"]
    assert_close(c_attn[:, ::3], GOLDENS["prime/gradient"], backend, "gradient")


def test_vmap_over_rows_is_a_batch(jax_params: Any) -> None:
    import jax

    config, tokens = CONFIGS["prime"], jax.numpy.asarray(small_tokens("prime"))
    rows = jax.vmap(lambda row: gpt_xp.gpt2(jax_params, row, config))(tokens)
    batch = gpt_xp.gpt2(jax_params, tokens, config)
    assert_close(rows, np.asarray(batch), make_backend("jax"), "same")
