"""Parts of the model that are replaced for an experiment, on every backend; the oracle is the same maths by hand."""

import sys
from typing import Any

import numpy as np
import pytest
from commands import process
from comparison import TOLERANCE, assert_close, assert_values
from libraries import quantized
from naive_gpt2 import gpt2 as naive_gpt2
from small_models import CONFIGS, small_params, small_tokens, tree_map
from small_quantized import float64_of, small

import gpt_xp
from gpt_xp import Backend, Model, transformer
from gpt_xp.errors import SettingError
from gpt_xp.parts import ReplacedParts

CONFIG, PARAMS, TOKENS = CONFIGS["prime"], small_params("prime"), small_tokens("prime")[0].tolist()
MORE = {"max_tokens": 9, "speculate": True}


def no_mlp(x: Any, c_fc: Any, c_proj: Any, xp: Any) -> Any:
    """The feed-forward network adds nothing."""
    return 0 * x


def cube(x: Any, xp: Any) -> Any:
    """The article's own GELU, whose power no captured step knows."""
    return 0.5 * x * (1 + xp.tanh(np.sqrt(2 / np.pi).item() * (x + 0.044715 * x**3)))


def without_mlp() -> Any:
    """Params of the model in which `no_mlp` stands: its products give zeros."""

    def block(each: Any) -> Any:
        return each | {"mlp": each["mlp"] | {"c_proj": tree_map(np.zeros_like, each["mlp"]["c_proj"])}}

    return PARAMS | {"blocks": list(map(block, PARAMS["blocks"]))}


def test_a_replaced_part_counts_everywhere(backend: Backend) -> None:
    ours = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts(backend, ffn=no_mlp))
    expected = Model(without_mlp(), CONFIG, backend=backend)
    assert_values(ours.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["same", "float32"])
    assert ours.generate(TOKENS[:5], **MORE).token_ids == expected.generate(TOKENS[:5], **MORE).token_ids
    assert ours.score(TOKENS).perplexity == pytest.approx(expected.score(TOKENS).perplexity, rel=1e-5)
    params, tokens = ours.params, backend.asarray(np.array([TOKENS], np.int32))
    logits = gpt_xp.gpt2(params, tokens, CONFIG, xp=ours.backend.xp)
    assert_close(logits, expected.logits([TOKENS]), backend, "same")
    plain = Model(PARAMS, CONFIG, backend=backend).logits(TOKENS)  # after those: nothing of them is left
    assert_values(plain, naive_gpt2(TOKENS, **PARAMS, n_head=3), TOLERANCE["logits", "float32"])
    assert np.abs(plain - ours.logits(TOKENS)).max() > 0.1


def test_a_part_of_the_same_maths_is_the_same_model(backend: Backend) -> None:
    ours = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts(backend, gelu=cube))
    expected = Model(PARAMS, CONFIG, backend=backend)
    assert_values(ours.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["same", "float32"])
    assert ours.generate(TOKENS[:5], **MORE).token_ids == expected.generate(TOKENS[:5], **MORE).token_ids


def halved(x: Any, xp: Any) -> Any:
    """The weights of attention at temperature 2."""
    return transformer.softmax(x / 2, xp)


def with_halved_queries(params: Any) -> Any:
    """Params of the model in which `halved` stands."""

    def block(each: Any) -> Any:
        halves = np.repeat(np.float32([0.5, 1, 1]), CONFIG.n_embd)
        c_attn = {name: leaf * halves for name, leaf in each["attn"]["c_attn"].items()}
        return each | {"attn": each["attn"] | {"c_attn": c_attn}}

    return params | {"blocks": list(map(block, params["blocks"]))}


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_replaced_softmax_counts_everywhere(backend: Backend, kind: str | None) -> None:
    """A backend's own attention steps aside, for one query as for many."""
    if kind:
        quantized(backend)  # or the test is skipped
    params = small("int8")[0] if kind else PARAMS
    ours = Model(params, CONFIG, backend=gpt_xp.with_parts(backend, softmax=halved))
    expected = Model(with_halved_queries(float64_of(params)), CONFIG, backend=backend)
    assert_values(ours.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["logits", "float32"])
    assert ours.generate(TOKENS[:5], **MORE).token_ids == expected.generate(TOKENS[:5], **MORE).token_ids


@pytest.mark.parametrize(
    "name",
    ["gelu", "softmax", "layer_norm", "linear", "attention", "mha", "ffn", "transformer_block", "embed", "unembed"],
)
def test_each_part_may_call_the_one_that_it_replaces(name: str) -> None:
    calls = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return getattr(transformer, name)(*args, **kwargs)

    ours = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts("numpy", **{name: watched}))
    expected = Model(PARAMS, CONFIG, backend="numpy")
    assert_values(ours.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["same", "float32"])
    assert calls


def test_several_parts_are_replaced_one_inside_the_other() -> None:
    seen: list[Any] = []

    def block(x: Any, *args: Any, xp: Any, **kwargs: Any) -> Any:
        return transformer.transformer_block(x, *args, xp=xp, **kwargs)

    def attention(q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
        seen.append(np.asarray(transformer.attention(q, k, v, mask, xp)))
        return seen[-1]

    ours = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts("numpy", transformer_block=block, attention=attention))
    out = ours.generate(TOKENS[:5], max_tokens=4)
    assert out.token_ids == Model(PARAMS, CONFIG, backend="numpy").generate(TOKENS[:5], max_tokens=4).token_ids
    assert [each.shape for each in seen] == [(1, 3, 5, 13)] * 2 + [(1, 3, 1, 13)] * 6  # prefill, and three steps


def test_quantized_weights_with_replaced_parts(backend: Backend) -> None:
    quantized(backend)  # or the test is skipped
    params, config = small("int8")
    ours = Model(params, config, backend=gpt_xp.with_parts(backend, gelu=cube))
    expected = Model(params, config, backend=backend)
    assert_values(ours.logits(TOKENS), expected.logits(TOKENS), TOLERANCE["same", "float32"])
    assert ours.generate(TOKENS[:5], **MORE).token_ids == expected.generate(TOKENS[:5], **MORE).token_ids


def test_jit_sees_the_replaced_part() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    params = tree_map(lambda leaf: jax.numpy.asarray(leaf, "float32"), PARAMS)
    tokens = jax.numpy.asarray(TOKENS)
    forward = jax.jit(gpt_xp.gpt2, static_argnames=("config", "xp"))
    before = forward(params, tokens, CONFIG, xp=jax.numpy)
    after = forward(params, tokens, CONFIG, xp=gpt_xp.with_parts("jax", ffn=no_mlp).xp)
    assert_values(np.asarray(after), naive_gpt2(TOKENS, **without_mlp(), n_head=3), TOLERANCE["logits", "float32"])
    assert np.abs(np.asarray(after - before)).max() > 0.1


@pytest.mark.parametrize("parts", [{"glu": cube}, {"lm_loss": cube}])
def test_what_replaces_no_part_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"has no part '(glu|lm_loss)'; its parts are: gelu, softmax, layer_norm"):
        gpt_xp.with_parts("numpy", **parts)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(SettingError, match="the part gelu can be replaced by a function, not by 3"):
        gpt_xp.with_parts("numpy", gelu=3)


def test_parts_can_be_replaced_before_anything_else_is_imported() -> None:
    code = "import gpt_xp; gpt_xp.with_parts('array-api-strict', gelu=lambda x, xp: x)"
    assert process(command=[sys.executable, "-c", code]) == (0, "", "")


def test_parts_of_a_namespace_whose_parts_are_replaced_already() -> None:
    """NumPy replaces attention and GELU itself. An experiment with another part leaves them in place."""
    x, xp = np.ones((2, 3), np.float32), gpt_xp.get_backend("array-api-strict").xp
    x = xp.asarray(x)
    twice = ReplacedParts(xp, {"gelu": lambda x, xp: 2 * transformer.gelu(x, xp)})
    same = [transformer.gelu(x, xp)[0, 0] * factor for factor in (2, 3)]
    other = ReplacedParts(twice, {"ffn": no_mlp})
    assert transformer.gelu(x, other)[0, 0] == same[0]
    assert transformer.gelu(x, other.without("ffn"))[0, 0] == same[0]
    assert (
        transformer.gelu(x, ReplacedParts(twice, {"gelu": lambda x, xp: 1.5 * transformer.gelu(x, xp)}))[0, 0]
        == same[1]
    )


# Functions of `transformer.py` that are replaced in the module itself: what a learner does first.


def hooked(collected: list[np.ndarray]) -> Any:
    original = transformer.attention

    def attention(q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
        heads = original(q, k, v, mask, xp)
        collected.append(np.asarray(heads))
        return heads

    return attention


REPLACED = {
    "a power": ("gelu", cube),
    "NumPy's own function": ("gelu", lambda x, xp: 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x * x * x)))),
    "a comparison": ("gelu", lambda x, xp: xp.where(x > 0, x, 0 * x)),
    "an equality": ("gelu", lambda x, xp: xp.where(x == 0, x, x)),
    "a method": ("gelu", lambda x, xp: x.clip(0, None)),
    "in place": ("gelu", lambda x, xp: np.maximum(x, 0, out=x)),
    "a truth": ("gelu", lambda x, xp: x if x[0, 0] else 0 * x),
    "a number": ("gelu", lambda x, xp: x * float(x[0, 0])),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_function_computes_what_it_says(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Nothing stands between NumPy and the function: it has arrays with numbers, and may do with them what it likes."""
    name, function = REPLACED[what]
    expected = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts("numpy", **{name: function})).logits(TOKENS)
    monkeypatch.setattr(transformer, name, function)
    model = Model(PARAMS, CONFIG, backend="numpy")
    assert_values(model.logits(TOKENS), expected, TOLERANCE["same", "float32"])
    ids = [out.token_ids for out in (model.generate(TOKENS[:5], max_tokens=9) for _ in range(2))]
    assert ids[0] == ids[1]


def test_a_hook_that_collects_numbers_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[np.ndarray] = []
    monkeypatch.setattr(transformer, "attention", hooked(found))
    Model(PARAMS, CONFIG, backend="numpy").generate(TOKENS[:5], max_tokens=9)
    assert [each.shape for each in found] == [(1, 3, 5, 13)] * 2 + [(1, 3, 1, 13)] * 16
