"""JAX with the settings of a user's program: arrays on several devices, rank promotion, 64 bits."""

import os
import subprocess
import sys

import numpy as np
import pytest
from commands import PATIENCE
from comparison import TOLERANCE, assert_values
from folders import TESTS
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

from gpt_xp import Model

CONFIG, PARAMS, TOKENS = CONFIGS["prime"], small_params("prime"), small_tokens("prime")

ON_THREE_DEVICES = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from small_models import CONFIGS, small_params, small_tokens, tree_map
import gpt_xp
from gpt_xp.arrays import device_of

config = dataclasses.replace(CONFIGS["prime"], n_layer=1)
plain = tree_map(lambda leaf: jnp.asarray(leaf, "float32"), small_params("prime"))
plain["blocks"] = plain["blocks"][:1]
tokens, start = small_tokens("prime")[:, :15], np.zeros(3, np.int32)

def results(place, params):
    rows = place(tokens)
    yield gpt_xp.gpt2(params, rows, config)
    cache = gpt_xp.new_cache(config, params["wte"], 15, place(start))  # and so many tokens: most programs are shared
    yield gpt_xp.gpt2_with_cache(params, rows, config, cache)[0]

mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,))
sharded = results(
    lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(plain, NamedSharding(mesh, P()))
)
for ours, right in zip(sharded, results(jnp.asarray, plain), strict=True):
    assert len(ours.sharding.device_set) == 3
    np.testing.assert_allclose(ours, right, atol=2e-5)
moved = jax.device_put(jnp.zeros(3), jax.devices()[2])
assert device_of(moved) == jax.devices()[2], "on one device, new arrays are made beside it"
print("done")
"""


def test_functions_on_sharded_arrays_without_jit() -> None:
    make_backend("jax")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    path = os.pathsep.join([str(TESTS / "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_THREE_DEVICES],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_works_whatever_rank_promotion_is_set_to(dtype: str) -> None:
    backend = make_backend("jax", dtype)
    import jax

    model = Model(PARAMS, CONFIG, backend=backend)
    expected = Model(PARAMS, CONFIG, backend=make_backend("numpy", dtype))
    with jax.numpy_rank_promotion("raise"):
        assert_values(model.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["logits", dtype])
        sampled = {"max_tokens": 7, "temperature": 0.8, "top_p": 0.9, "seed": 3}
        prompt = TOKENS[0, :5].tolist()
        assert model.generate(prompt, **sampled).token_ids == expected.generate(prompt, **sampled).token_ids
        ids = TOKENS[0].tolist()
        assert model.score(ids).perplexity == pytest.approx(expected.score(ids).perplexity, rel=1e-4)
        model.rank(ids[:3], [ids[3:5], ids[5:6]])
        assert jax.config.jax_numpy_rank_promotion == "raise"


def test_decoding_in_blocks_works_whatever_rank_promotion_is_set_to() -> None:
    from libraries import in_blocks

    backend = make_backend("jax")
    import jax

    prompt = TOKENS[0, :5].tolist()
    expected = Model(PARAMS, CONFIG, backend=backend).generate(prompt, max_tokens=7)
    with jax.numpy_rank_promotion("raise"):
        assert Model(PARAMS, CONFIG, backend=in_blocks(backend)).generate(prompt, max_tokens=7).token_ids == (
            expected.token_ids
        )


def test_float64_needs_no_setting_of_the_program() -> None:
    backend = make_backend("jax", "float64")
    import jax

    assert not jax.config.jax_enable_x64
    model = Model(PARAMS, CONFIG, backend=backend)
    assert model.logits(TOKENS).dtype == np.float64
    assert not jax.config.jax_enable_x64
