"""`trace`: the names, shapes and numbers of what is inside the forward pass, on every backend.

The oracles are a second GPT-2 in float64, and TransformerLens itself (`-m oracle`).
"""

from typing import Any

import naive_gpt2
import numpy as np
import pytest
from comparison import TOLERANCE, assert_close, assert_values, xp_of
from folders import ROOT
from libraries import make_backend, quantized, skipping_what_is_missing
from small_models import CONFIGS, small_params, small_tokens, tree_map
from small_quantized import float64_of, small

import gpt_xp
from gpt_xp import Backend, Model, transformer
from gpt_xp.errors import PromptError, SettingError

CONFIG, PARAMS, TOKENS = CONFIGS["prime"], small_params("prime"), small_tokens("prime")[0]
N_SEQ, N_EMBD, N_HEAD = len(TOKENS), CONFIG.n_embd, CONFIG.n_head
D_HEAD = N_EMBD // N_HEAD

WIDE, HEADS, SQUARE = (N_SEQ, N_EMBD), (N_SEQ, N_HEAD, D_HEAD), (N_HEAD, N_SEQ, N_SEQ)
SHAPES = {
    "hook_embed": WIDE, "hook_pos_embed": WIDE,
    **{
        f"blocks.{i}.{name}": shape
        for i in range(CONFIG.n_layer)
        for name, shape in {
            "hook_resid_pre": WIDE, "ln1.hook_scale": (N_SEQ, 1), "ln1.hook_normalized": WIDE, "attn.hook_q": HEADS,
            "attn.hook_k": HEADS, "attn.hook_v": HEADS, "attn.hook_attn_scores": SQUARE, "attn.hook_pattern": SQUARE,
            "attn.hook_z": HEADS, "hook_attn_out": WIDE, "hook_resid_mid": WIDE, "ln2.hook_scale": (N_SEQ, 1),
            "ln2.hook_normalized": WIDE, "mlp.hook_pre": (N_SEQ, 4 * N_EMBD), "mlp.hook_post": (N_SEQ, 4 * N_EMBD),
            "hook_mlp_out": WIDE, "hook_resid_post": WIDE,
        }.items()
    },
    "ln_final.hook_scale": (N_SEQ, 1), "ln_final.hook_normalized": WIDE, "logits": (N_SEQ, CONFIG.n_vocab),
}  # fmt: skip


def naive_trace(params: Any, tokens: Any) -> dict[str, np.ndarray]:
    """Compute every intermediate once more, in float64, with the naive functions where there is one."""
    embedded, placed = np.float64(params["wte"])[tokens], np.float64(params["wpe"])[: len(tokens)]
    found = {"hook_embed": embedded, "hook_pos_embed": placed}
    x = embedded + placed
    for i, block in enumerate(params["blocks"]):
        name = f"blocks.{i}."
        found[name + "hook_resid_pre"] = x
        normalized = norm(found, name + "ln1", x, block["ln_1"])
        attended = naive_heads(found, name + "attn.", normalized, block["attn"]["c_attn"])
        found[name + "hook_attn_out"] = naive_gpt2.linear(attended, **block["attn"]["c_proj"])
        found[name + "hook_resid_mid"] = x = x + found[name + "hook_attn_out"]
        normalized = norm(found, name + "ln2", x, block["ln_2"])
        found[name + "mlp.hook_pre"] = naive_gpt2.linear(normalized, **block["mlp"]["c_fc"])
        found[name + "mlp.hook_post"] = naive_gpt2.gelu(found[name + "mlp.hook_pre"])
        found[name + "hook_mlp_out"] = naive_gpt2.linear(found[name + "mlp.hook_post"], **block["mlp"]["c_proj"])
        found[name + "hook_resid_post"] = x = x + found[name + "hook_mlp_out"]
    found["logits"] = norm(found, "ln_final", x, params["ln_f"]) @ np.float64(params["wte"]).T
    return found


def norm(found: dict[str, np.ndarray], name: str, x: np.ndarray, weights: Any) -> np.ndarray:
    found[name + ".hook_scale"] = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    found[name + ".hook_normalized"] = naive_gpt2.layer_norm(x, g=1, b=0)
    return naive_gpt2.layer_norm(x, **weights)


def naive_heads(found: dict[str, np.ndarray], name: str, x: np.ndarray, c_attn: Any) -> np.ndarray:
    n_seq = len(x)
    q, k, v = np.split(naive_gpt2.linear(x, **c_attn).reshape(n_seq, 3, N_HEAD, -1), 3, axis=1)
    pattern, scores = np.zeros((2, N_HEAD, n_seq, n_seq))
    z = np.empty((n_seq, N_HEAD, q.shape[-1]))
    for head in range(N_HEAD):
        for i in range(n_seq):
            seen = slice(0, i + 1)
            scores[head, i, seen] = k[seen, 0, head] @ q[i, 0, head] / np.sqrt(q.shape[-1])
            pattern[head, i, seen] = naive_gpt2.softmax(scores[head, i, seen])
            z[i, head] = pattern[head, i, seen] @ v[seen, 0, head]
    found |= {name + "hook_q": q[:, 0], name + "hook_k": k[:, 0], name + "hook_v": v[:, 0], name + "hook_z": z}
    found |= {name + "hook_pattern": pattern, name + "hook_attn_scores": scores}
    return z.reshape(n_seq, -1)


def visible(name: str, x: np.ndarray) -> np.ndarray:
    """Return scores with 0 where a token may not look, which has a number of its own in each library."""
    return np.tril(x) if name.endswith("scores") else x


def test_names_and_shapes_and_order(backend: Backend) -> None:
    found = Model(PARAMS, CONFIG, backend=backend).trace(TOKENS.tolist())
    assert [(name, x.shape) for name, x in found.items()] == list(SHAPES.items())
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}


def test_numbers(backend: Backend) -> None:
    found, expected = Model(PARAMS, CONFIG, backend=backend).trace(TOKENS.tolist()), naive_trace(PARAMS, TOKENS)
    for name, x in found.items():
        assert_values(visible(name, x), expected[name], TOLERANCE["logits", "float32"])


def test_a_batch_has_the_arrays_of_each_row(backend: Backend) -> None:
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    params = backend.place(PARAMS, CONFIG)
    names = ("hook_embed", "blocks.1.ln2.hook_scale", "blocks.*.attn.*", "blocks.0.mlp.hook_post", "logits")
    trace = backend.compile(gpt_xp.trace, static=("config", "names", "xp"))
    found = trace(params, backend.asarray(tokens, "int32"), config=CONFIG, names=names, xp=xp_of(backend))
    for row, ids in enumerate(tokens):
        alone = trace(params, backend.asarray(ids, "int32"), config=CONFIG, names=names, xp=xp_of(backend))
        assert list(alone) == list(found)
        for name, x in found.items():
            assert_close(x[row, ...], backend.to_numpy(alone[name]), backend, "same")


@pytest.mark.parametrize("config", ["prime", "long"])
def test_it_is_the_forward_pass_to_the_bit_on_numpy(config: str) -> None:
    params, tokens = float32(small_params(config)), small_tokens(config)[0]
    found = gpt_xp.trace(params, tokens, CONFIGS[config])
    states = gpt_xp.hidden_states(params, tokens, CONFIGS[config])[0]
    np.testing.assert_array_equal(params["ln_f"]["g"] * found["ln_final.hook_normalized"] + params["ln_f"]["b"], states)
    np.testing.assert_array_equal(found["logits"], gpt_xp.gpt2(params, tokens, CONFIGS[config]))


def float32(params: Any) -> Any:
    return tree_map(np.float32, params)


def test_a_pattern_chooses() -> None:
    model = Model(PARAMS, CONFIG, backend="numpy")
    assert list(model.trace([1, 2], "blocks.*.attn.hook_pattern")) == [
        "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern",
    ]  # fmt: skip
    assert list(model.trace([1, 2], ["logits", "hook_embed"])) == ["hook_embed", "logits"]
    assert list(model.trace([1, 2], ("blocks.1.hook_resid_*",))) == [
        "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post",
    ]  # fmt: skip


@pytest.mark.parametrize("names", ["blocks.2.hook_resid_post", "pattern", "", ["logits", "blocks.*.hook_scale?"], [3]])
def test_a_name_of_nothing_is_refused(names: Any) -> None:
    with pytest.raises(SettingError, match=r"no intermediate of this model is called .* blocks\.0 to blocks\.1"):
        Model(PARAMS, CONFIG, backend="numpy").trace([1, 2], names)


@pytest.mark.parametrize("prompt", [[101], list(range(38)), "text"])
def test_bad_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(PromptError):
        Model(PARAMS, CONFIG, backend="numpy").trace(prompt)


def test_under_jit_and_vmap_it_is_a_dict_of_arrays() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    backend = make_backend("jax")
    params, tokens = backend.place(PARAMS, CONFIG), backend.asarray(np.stack([TOKENS, TOKENS[::-1]]), "int32")

    def patterns(tokens: Any) -> Any:
        return gpt_xp.trace(params, tokens, CONFIG, "blocks.*.attn.hook_pattern")

    expected = gpt_xp.trace(PARAMS, np.stack([TOKENS, TOKENS[::-1]]), CONFIG, "blocks.*.attn.hook_pattern")
    for found in (jax.jit(patterns)(tokens), jax.jit(jax.vmap(patterns))(tokens)):
        assert sorted(found) == sorted(expected)
        for name, x in found.items():
            assert_values(np.asarray(x), expected[name], TOLERANCE["logits", "float32"])


def test_a_gradient_goes_through_it() -> None:
    """The gradient of a head's weight by the embedding: finite differences in float64 are the oracle."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    with jax.enable_x64(True):
        tokens = jax.numpy.asarray(TOKENS)

        def weight(wpe: Any) -> Any:
            name = "blocks.1.attn.hook_pattern"
            params = jax.tree.map(jax.numpy.asarray, PARAMS | {"wpe": wpe})
            return gpt_xp.trace(params, tokens, CONFIG, name)[name][2, -1, 3]

        weight = jax.jit(weight)
        wpe, step = jax.numpy.asarray(PARAMS["wpe"]), 1e-6
        gradient = jax.jit(jax.grad(weight))(wpe)[3, 5]
        moved = wpe.at[3, 5]
        difference = (weight(moved.add(step)) - weight(moved.add(-step))) / (2 * step)
    assert abs(float(difference)) > 1e-6
    assert float(gradient) == pytest.approx(float(difference), rel=1e-5)


def test_quantized_weights(backend: Backend) -> None:
    quantized(backend)  # or the test is skipped
    params, config = small("int8")
    found = Model(params, config, backend=backend).trace(TOKENS.tolist())
    expected = naive_trace(float64_of(params), TOKENS)
    for name, x in found.items():
        assert_values(visible(name, x), expected[name], 1e-4)


def test_a_replaced_part_is_seen() -> None:
    backend = gpt_xp.with_parts("numpy", gelu=lambda x, xp: 0 * x)
    found = Model(PARAMS, CONFIG, backend=backend).trace(TOKENS.tolist(), "blocks.*.mlp.hook_*")
    assert np.abs(found["blocks.1.mlp.hook_pre"]).max() > 0.1
    assert not found["blocks.1.mlp.hook_post"].any()


def test_parts_that_have_no_such_intermediate() -> None:
    """Nothing is shown in its place: weights of attention that were not used would be a wrong answer."""

    def average(q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
        return 0 * q + xp.mean(v, axis=2, keepdims=True)

    def twice(q: Any, k: Any, v: Any, mask: Any, xp: Any) -> Any:
        return transformer.attention(q, k, v, mask, xp) - transformer.attention(q, 2 * k, v, mask, xp)

    for attention, why in ((average, "does not compute"), (twice, "computes more than once")):
        model = Model(PARAMS, CONFIG, backend=gpt_xp.with_parts("numpy", attention=attention))
        assert np.isfinite(model.trace([1, 2, 3], "blocks.*.attn.hook_z")["blocks.1.attn.hook_z"]).all()
        with pytest.raises(SettingError, match=rf"one that {why} blocks.0.attn.hook_pattern: leave this name out"):
            model.trace([1, 2, 3], "blocks.*.attn.hook_pattern")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_another_part_does_not_compute_is_refused(quantize: str | None) -> None:
    """Another layer norm has another scale, or none. A backend's own layer norm is the model's."""

    def rms_norm(x: Any, g: Any, b: Any, xp: Any, eps: float = 1e-5) -> Any:
        return g * x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) + b

    def without_positions(tokens: Any, positions: Any, wte: Any, wpe: Any, xp: Any) -> Any:
        return xp.take(wte, tokens, axis=0)

    params = PARAMS if quantize is None else gpt_xp.quantize(PARAMS, quantize)
    with skipping_what_is_missing("numba"):
        plain = Model(params, CONFIG, backend="numpy")
    names = ("ln_final.hook_scale", "blocks.0.ln1.hook_normalized", "hook_pos_embed")
    assert plain.trace([1, 2, 3], names).keys() == set(names)
    model = Model(params, CONFIG, backend=gpt_xp.with_parts("numpy", layer_norm=rms_norm, embed=without_positions))
    assert np.isfinite(model.trace([1, 2, 3], "blocks.*.hook_resid_mid")["blocks.1.hook_resid_mid"]).all()
    for name in names:
        with pytest.raises(SettingError, match=f"one that does not compute {name}: leave this name out"):
            model.trace([1, 2, 3], name)


def test_the_documentation_lists_all_names() -> None:
    page = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8")
    for name in SHAPES:
        assert f"`{name.replace('blocks.0', 'blocks.i').replace('blocks.1', 'blocks.i')}`" in page, name


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["prime", "124M-ratios", "planted"])
def test_the_activations_are_those_of_transformer_lens(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev,oracle]'")
    lens = pytest.importorskip("transformer_lens", reason="it is not installed: pip install -e '.[dev,oracle]'")
    config, params, tokens = CONFIGS[name], float32(small_params(name)), small_tokens(name)[0]
    theirs = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=config.n_layer, d_model=config.n_embd, n_ctx=config.n_ctx, n_heads=config.n_head,
            d_head=config.n_embd // config.n_head, d_vocab=config.n_vocab, act_fn="gelu_new", eps=1e-5,
            normalization_type="LN", device="cpu", seed=0,
        )
    )  # fmt: skip
    theirs.load_state_dict(lens_weights(torch, params, config), strict=False)
    logits, cache = theirs.run_with_cache(torch.tensor(tokens, dtype=torch.long)[None])
    found = Model(params, config, backend="numpy").trace(tokens.tolist())
    assert {*cache} - {"unembed.hook_in", "unembed.hook_out"} == {*found} - {"logits"}
    for each, x in found.items():
        expected = logits if each == "logits" else cache[each]
        assert_values(visible(each, x), visible(each, expected[0].detach().numpy()), TOLERANCE["logits", "float32"])


def lens_weights(torch: Any, params: Any, config: Any) -> dict[str, Any]:
    """Return the params under TransformerLens' names and in its shapes, unchanged otherwise."""
    n_head, n_embd = config.n_head, config.n_embd
    weights = {
        "embed.W_E": params["wte"], "pos_embed.W_pos": params["wpe"], "unembed.W_U": params["wte"].T,
        "unembed.b_U": np.zeros(config.n_vocab), "ln_final.w": params["ln_f"]["g"], "ln_final.b": params["ln_f"]["b"],
    }  # fmt: skip
    for i, block in enumerate(params["blocks"]):
        own: dict[str, Any] = {}
        for ours, norm in (("ln_1", "ln1"), ("ln_2", "ln2")):
            own |= {f"{norm}.w": block[ours]["g"], f"{norm}.b": block[ours]["b"]}
        c_attn, c_proj = block["attn"]["c_attn"], block["attn"]["c_proj"]
        for letter, w, b in zip("QKV", np.split(c_attn["w"], 3, axis=1), np.split(c_attn["b"], 3), strict=True):
            own[f"attn.W_{letter}"] = w.reshape(n_embd, n_head, -1).swapaxes(0, 1)
            own[f"attn.b_{letter}"] = b.reshape(n_head, -1)
        own |= {"attn.W_O": c_proj["w"].reshape(n_head, -1, n_embd), "attn.b_O": c_proj["b"]}
        for ours, way in (("c_fc", "in"), ("c_proj", "out")):
            own |= {f"mlp.W_{way}": block["mlp"][ours]["w"], f"mlp.b_{way}": block["mlp"][ours]["b"]}
        weights |= {f"blocks.{i}.{name}": x for name, x in own.items()}
    return {name: torch.tensor(np.ascontiguousarray(x), dtype=torch.float32) for name, x in weights.items()}
