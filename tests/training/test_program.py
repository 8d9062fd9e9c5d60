"""The step of training: what is computed. `test_training_oracle` compares it with torch."""

import math
from typing import Any

import numpy as np
import pytest
from libraries import skipping_what_is_missing
from small_models import leaves, tree_map

import gpt_xp
from gpt_xp.training.program import Program, drop_weights, jax_backend, join, split
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.training.start import random_params

pytestmark = pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")


@pytest.fixture(autouse=True, scope="module")
def _needs_jax_and_optax() -> None:
    with skipping_what_is_missing("jax"):
        jax_backend(TrainingSettings(data=("x",)))


def flat(tree: Any) -> list[np.ndarray]:
    """The leaves in JAX's order, which sorts the names."""
    import jax

    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def adamw_in_float64(
    params: Any, gradients: list[Any], rates: list[float], settings: TrainingSettings
) -> list[np.ndarray]:
    """Loshchilov & Hutter 2019, algorithm 2, with the learning rate as the schedule; gradients clipped before."""
    weights = flat(params)
    m, v = [0 * leaf for leaf in weights], [0 * leaf for leaf in weights]
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in flat(gradient)))
        for i, (leaf, w) in enumerate(zip(flat(gradient), weights, strict=True)):
            clipped = leaf * min(1, settings.clip / norm)
            m[i] = settings.beta1 * m[i] + (1 - settings.beta1) * clipped
            v[i] = settings.beta2 * v[i] + (1 - settings.beta2) * clipped**2
            step = m[i] / (1 - settings.beta1**t) / (np.sqrt(v[i] / (1 - settings.beta2**t)) + 1e-8)
            weights[i] = w - rate * (step + (settings.weight_decay * w if w.ndim > 1 else 0))
    return weights


def test_steps_are_adamw_on_the_gradient_of_lm_loss() -> None:
    import jax

    settings = TrainingSettings(data=("x",), steps=10, warmup=2, weight_decay=0.3, clip=0.5, accumulate=1, average=0.9)
    config = gpt_xp.GPT2Config(n_vocab=101, n_ctx=17, n_embd=39, n_head=3, n_layer=1)
    params = random_params(config, seed=3)
    program = Program(settings, config, params, jax_backend(settings))
    state, gradients, average = program.initial_state(), [], flat(params)
    tokens = np.random.RandomState(0).randint(0, 101, size=(4, 1, 5, 14)).astype(np.int32)
    gradient_of = jax.jit(jax.value_and_grad(gpt_xp.lm_loss), static_argnums=2)  # jax.numpy's own `max`
    with jax.default_matmul_precision("highest"):
        for step, rows in enumerate(tokens):
            loss, gradient = gradient_of(state["params"], jax.numpy.asarray(rows[0]), config)
            gradients.append(flat(gradient))
            state, found = program.train(state, rows, step)
            np.testing.assert_allclose(float(found), float(loss), rtol=1e-6)
            keep = min(0.9, (step + 1) / (step + 10))
            average = [keep * a + (1 - keep) * b for a, b in zip(average, flat(state["params"]), strict=True)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(2)]
    rates = [1e-3 * rate for rate in (0, 0.5, *cosine)]
    for leaf, wanted in zip(flat(state["params"]), adamw_in_float64(params, gradients, rates, settings), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=2e-6)
        assert np.abs(wanted).max() > 1e-4  # something was learned, in the biases too
    for leaf, wanted in zip(flat(state["average"]), average, strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-6)
    assert [program.learning_rate(step) for step in range(4)] == pytest.approx(rates)


def test_weight_dropout_zeroes_matrices_of_blocks_and_keeps_the_mean() -> None:
    import jax

    config = gpt_xp.GPT2Config(n_vocab=101, n_ctx=17, n_embd=390, n_head=3, n_layer=1)
    params = random_params(config, seed=3)
    dropped = drop_weights(params, 0.25, jax.random.key(5, impl="rbg"))
    block, before = dropped["blocks"][0], params["blocks"][0]
    w, w_before = np.asarray(block["mlp"]["c_fc"]["w"]), before["mlp"]["c_fc"]["w"]
    zero = w == 0
    assert zero.mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(w[~zero], w_before[~zero] / 0.75, rtol=1e-6)
    assert not np.array_equal(zero[:, :390], np.asarray(block["attn"]["c_attn"]["w"])[:, :390] == 0)
    for name in ("wte", "wpe", "ln_f"):
        assert dropped[name] is params[name]
    assert block["ln_1"]["g"] is before["ln_1"]["g"]
    assert block["mlp"]["c_fc"]["b"] is before["mlp"]["c_fc"]["b"]
    assert drop_weights(params, 0.0, jax.random.key(5)) is params


def test_each_step_drops_other_weights() -> None:
    settings = TrainingSettings(
        data=("x",), weight_dropout=0.5, warmup=5, accumulate=1
    )  # step 0 has a learning rate of 0
    config = gpt_xp.GPT2Config(n_vocab=101, n_ctx=17, n_embd=39, n_head=3, n_layer=1)
    program = Program(
        settings, config, tree_map(lambda leaf: 3 * leaf, random_params(config, 0)), jax_backend(settings)
    )
    tokens = np.random.RandomState(0).randint(0, 101, size=(1, 5, 14)).astype(np.int32)
    losses = [float(program.train(program.initial_state(), tokens, step)[1]) for step in (0, 1, 0)]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_bfloat16_multiplies_copies_and_trains_float32() -> None:
    """On a CPU gpt-xp refuses it, as slower than float32: here it is allowed, for there is a device to compute it."""
    settings = TrainingSettings(data=("x",), warmup=0, accumulate=1)
    config = gpt_xp.GPT2Config(n_vocab=101, n_ctx=17, n_embd=39, n_head=3, n_layer=1)
    tokens = np.random.RandomState(0).randint(0, 101, size=(1, 5, 14)).astype(np.int32)
    backend = jax_backend(settings)
    found = {}
    for dtype in ("float32", "bfloat16"):
        program = Program(settings, config, random_params(config, 0), backend.replace(dtype=dtype))
        state, loss = program.train(program.initial_state(), tokens, 0)
        assert {str(leaf.dtype) for leaf in leaves(state["params"])} == {"float32"}
        found[dtype] = float(loss)
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=1e-3)  # 8 bits of a logit, averaged over 65 of them
    assert found["float32"] != found["bfloat16"]


def test_initial_params_are_gpt2s() -> None:
    config = gpt_xp.GPT2Config(n_vocab=1009, n_ctx=307, n_embd=240, n_head=3, n_layer=8)
    params = random_params(config, seed=1)
    block = params["blocks"][5]
    attn, mlp = block["attn"], block["mlp"]
    arrays = {"wte": params["wte"], "wpe": params["wpe"], "attn": attn["c_attn"]["w"], "fc": mlp["c_fc"]["w"]}
    arrays |= {"attn out": attn["c_proj"]["w"], "mlp out": mlp["c_proj"]["w"]}
    found = {name: float(array.std()) for name, array in arrays.items()}
    wanted = {"wte": 0.02, "wpe": 0.01, "attn": 0.02, "fc": 0.02, "attn out": 0.005, "mlp out": 0.005}
    assert found == pytest.approx(wanted, rel=0.02)
    assert {str(leaf.dtype) for leaf in leaves(params)} == {"float32"}
    assert not block["attn"]["c_attn"]["b"].any()
    assert (params["ln_f"]["g"] == 1).all()
    np.testing.assert_array_equal(params["wte"], random_params(config, seed=1)["wte"])
    assert not np.array_equal(params["wte"], random_params(config, seed=2)["wte"])


def test_split_and_join_are_inverse() -> None:
    params = random_params(gpt_xp.GPT2Config(n_vocab=7, n_ctx=5, n_embd=3, n_head=3, n_layer=3), 0)
    for n in range(4):
        trained, frozen = split(params, n)
        joined = join(trained, frozen)
        assert sorted(joined) == sorted(params)
        assert len(trained["blocks"]) == 3 - n
        for a, b in zip(leaves(params["blocks"]), leaves(joined["blocks"]), strict=True):
            assert a is b
