"""New weights for a model that is there: assigned, they count everywhere, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from libraries import quantized
from small_models import CONFIGS, leaves, small_params, small_tokens, tree_map
from small_quantized import small

from gpt_xp import Backend, Model
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import ConfigError

CONFIG, TOKENS = CONFIGS["prime"], small_tokens("prime")[0].tolist()


def other_params() -> Any:
    """Params in which every weight is another."""
    return tree_map(lambda leaf: leaf[::-1].copy() * 1.01, small_params("prime"))


def of(params: Any, **changes: Any) -> Any:
    return params | changes


def test_assigned_params_count_everywhere(backend: Backend, tmp_path: Path) -> None:
    model = Model(small_params("prime"), CONFIG, backend=backend)
    before = model.logits(TOKENS), model.generate(TOKENS[:5], max_tokens=7)
    model.params = other_params()
    fresh = Model(other_params(), CONFIG, backend=backend)
    assert_values(model.logits(TOKENS), fresh.logits(TOKENS), TOLERANCE["same", "float32"])
    assert np.abs(model.logits(TOKENS) - before[0]).max() > 0.1
    assert model.generate(TOKENS[:5], max_tokens=7).token_ids == fresh.generate(TOKENS[:5], max_tokens=7).token_ids
    assert model.generate(TOKENS[:5], max_tokens=7).token_ids != before[1].token_ids
    assert model.score(TOKENS).perplexity == pytest.approx(fresh.score(TOKENS).perplexity)
    assert model.rank(TOKENS[:3], [[1], [2]])[0].logprob == pytest.approx(fresh.rank(TOKENS[:3], [[1], [2]])[0].logprob)
    assert str(model.params["wte"].dtype) == str(fresh.params["wte"].dtype), "moved as those of a new model are"
    model.save(tmp_path)
    saved = read_params(tmp_path, CONFIG)
    for ours, expected in zip(leaves(saved), leaves(other_params()), strict=True):
        np.testing.assert_array_equal(ours, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: None, r"wte must be \[101, 39\], not missing"),
        (lambda p: of(p, wte=p["wte"][1:]), r"wte must be \[101, 39\], not \[100, 39\]"),
        (lambda p: of(p, wte=3), r"wte must be \[101, 39\], not \[\]"),
        (lambda p: of(p, blocks=p["blocks"][:1]), r"blocks.1.ln_1.g must be \[39\], not missing"),
        (lambda p: {name: p[name] for name in p if name != "ln_f"}, r"ln_f.g must be \[39\], not missing"),
        (lambda p: of(p, lm_head=p["wte"]), r"lm_head must be left out, not \[101, 39\]"),
    ],
)
def test_params_that_do_not_fit_are_refused_and_the_model_stays(wrong: Any, message: str) -> None:
    model = Model(small_params("prime"), CONFIG, backend="numpy")
    before = model.logits(TOKENS)
    for assign in (lambda new: setattr(model, "params", new), lambda new: Model(new, CONFIG, backend="numpy")):
        with pytest.raises(ConfigError, match=f"params must be a tree of arrays .*{message}"):
            assign(wrong(small_params("prime")))
    np.testing.assert_array_equal(model.logits(TOKENS), before)


def test_a_tuple_of_blocks_is_a_list_of_them() -> None:
    params = small_params("prime")
    model = Model(of(params, blocks=tuple(params["blocks"])), CONFIG, backend="numpy")
    assert_values(model.logits(TOKENS), Model(params, CONFIG, backend="numpy").logits(TOKENS), 1e-7)


def test_quantized_params_can_be_assigned_and_plain_ones_again(backend: Backend) -> None:
    quantized(backend)  # or the test is skipped
    params, config = small("int8")
    model = Model(small_params("prime"), config, backend=backend)
    before = model.logits(TOKENS)
    model.params = params
    expected = Model(params, config, backend=backend).logits(TOKENS)
    assert_values(model.logits(TOKENS), expected, TOLERANCE["same", "float32"])
    assert np.abs(model.logits(TOKENS) - before).max() > 1e-4
    model.params = small_params("prime")
    assert_values(model.logits(TOKENS), before, TOLERANCE["same", "float32"])


@pytest.mark.parametrize("name", ["config", "tokenizer", "backend"])
def test_what_a_model_is_made_for_cannot_be_replaced(name: str) -> None:
    model = Model(small_params("prime"), CONFIG, backend="numpy")
    with pytest.raises(AttributeError, match=r"gpt_xp\.Model\(params, config, tokenizer, backend\)"):
        setattr(model, name, getattr(model, name))
