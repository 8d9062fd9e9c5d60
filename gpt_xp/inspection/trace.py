"""`gpt_xp.trace`: return the named intermediates of the forward pass.

The names are those of TransformerLens (`HookedTransformer`), so that its tutorials can be followed. Each part of the
model is replaced by itself, with a note of what goes in or comes out.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from gpt_xp import transformer
from gpt_xp.arrays import at_least_float32, namespace_of
from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.kv_cache import Past
from gpt_xp.parts import ReplacedParts, changed_parts
from gpt_xp.types import Array, Namespace, Params

Names: TypeAlias = str | Sequence[str] | None

# The parts of the model in which the intermediates are seen. Only those that are needed are replaced: NumPy computes
# attention in blocks, but not where softmax is replaced.
SEEN_IN = {
    "embed": ("hook_embed", "hook_pos_embed"),
    "layer_norm": ("hook_scale", "hook_normalized", "hook_resid_mid"),
    "mha": ("hook_attn_out",),
    "attention": ("hook_q", "hook_k", "hook_v", "hook_z"),
    "softmax": ("hook_attn_scores", "hook_pattern"),
    "ffn": ("hook_mlp_out",),
    "gelu": ("hook_pre", "hook_post"),
}

# In the order in which they are computed.
OF_A_BLOCK = (
    "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v",
    "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "ln2.hook_scale",
    "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip


def trace_names(config: GPT2Config, names: Names = None) -> tuple[str, ...]:
    """Return the names of the intermediates that match `names`, in the order in which they are computed.

    `names` is a name or a pattern such as "blocks.*.attn.hook_pattern", or several; None means all. Raises
    `SettingError` for one that matches nothing.
    """
    blocks = (f"blocks.{i}.{name}" for i in range(config.n_layer) for name in OF_A_BLOCK)
    known = ("hook_embed", "hook_pos_embed", *blocks, "ln_final.hook_scale", "ln_final.hook_normalized", "logits")
    if names is None:
        return known
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in known):
            raise SettingError(
                f"no intermediate of this model is called {pattern!r:.80}. There are hook_embed, hook_pos_embed, "
                f"blocks.0 to blocks.{config.n_layer - 1} (blocks.0.attn.hook_pattern, blocks.*.hook_resid_post), "
                "ln_final.hook_scale, ln_final.hook_normalized and logits; docs/inspecting.md lists all"
            )
    return tuple(name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns))


def trace(
    params: Params, tokens: Array, config: GPT2Config, names: Names = None, xp: Namespace = None
) -> dict[str, Array]:
    """Return named intermediates of the forward pass over `tokens`, which are [n_seq] or [batch, n_seq].

    The result maps names to arrays, in the order in which they are computed. `names` chooses some of them, as in
    `trace_names`; None takes all, which needs the memory of them all. In the shapes, `...` is the batch, if there is
    one:

    - `hook_embed`, `hook_pos_embed`, `hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out` and
      `hook_resid_post` are [..., n_seq, n_embd].
    - `hook_scale` [..., n_seq, 1] is what a layer norm divides by, and `hook_normalized` [..., n_seq, n_embd] the
      quotient, before `g` and `b`. They are float32 at least.
    - `hook_q`, `hook_k`, `hook_v` and `hook_z` are [..., n_seq, n_head, d_head].
    - `hook_attn_scores` (scaled; the smallest float32 where a token may not look) and `hook_pattern` (the weights of
      attention) are [..., n_head, n_seq, n_seq]: the query, then the key. They are float32 at least.
    - `mlp.hook_pre` and `mlp.hook_post`, before and after GELU, are [..., n_seq, 4 * n_embd].
    - `logits`, which TransformerLens returns apart, are [..., n_seq, n_vocab].

    The function is pure, and runs inside `jax.jit`. Raises `SettingError` for a name that matches nothing, and for one
    that a replaced part (`with_parts`) does not compute, or computes twice. Other errors are those of `gpt2`.

    Source of the names: TransformerLens, `HookedTransformer` and `components/`.
    """
    xp = namespace_of(params, tokens, config, xp)
    wanted = trace_names(config, names)
    seen = Seen(tokens.shape, wanted)
    x, _ = transformer.hidden_states(params, tokens, config, xp=ReplacedParts(xp, seen.parts()))
    if "logits" in wanted:
        seen.found["logits"] = transformer.unembed(x, params["wte"], xp)
    if missing := [name for name in wanted if name not in seen.found]:
        raise _other_part(missing[0], "does not compute")
    return {name: seen.found[name] for name in wanted}


def wide_trace(params: Params, tokens: Array, config: GPT2Config, names: Names, xp: Namespace) -> dict[str, Array]:
    """Return a `trace` of which all arrays are at least float32."""
    return {name: at_least_float32(x, xp) for name, x in trace(params, tokens, config, names, xp).items()}


class Seen:
    """The intermediates of one forward pass, and the parts of the model that note them in `found`.

    `shape` is that of the tokens. Without a cache, `found` has the arrays of `trace`.
    """

    def __init__(self, shape: tuple[int, ...], wanted: Sequence[str]) -> None:
        self.found: dict[str, Array] = {}
        self._shape, self._wanted = shape, frozenset(wanted)
        self._layer = 0
        # The layer norms that come next, and the name of what each reads.
        self._norms: list[tuple[str, str]] = []

    def parts(self) -> dict[str, Callable[..., Any]]:
        """Return the parts of the model that note what passes through them."""
        last = {name.rpartition(".")[2] for name in self._wanted}
        needed = [name for name, seen in SEEN_IN.items() if not last.isdisjoint(seen)]
        return {name: getattr(self, f"_{name}") for name in ("transformer_block", *needed)}

    def _embed(self, tokens: Array, positions: Array, wte: Array, wpe: Array, xp: Namespace) -> Array:
        if "embed" not in changed_parts(xp):  # Another one may add other numbers.
            self._note("hook_embed", xp.take(wte, tokens, axis=0), xp)
            self._note("hook_pos_embed", xp.take(wpe, positions, axis=0), xp)
        return transformer.embed(tokens, positions, wte, wpe, xp)

    def _transformer_block(self, x: Array, xp: Namespace, **rest: Any) -> tuple[Array, Past]:
        block = f"blocks.{self._layer}."
        self._note(block + "hook_resid_pre", x, xp)
        self._norms = [(block + "ln1", ""), (block + "ln2", block + "hook_resid_mid")]
        x, past = transformer.transformer_block(x, **rest, xp=xp)
        self._note(block + "hook_resid_post", x, xp)
        self._layer, self._norms = self._layer + 1, [("ln_final", "")]
        return x, past

    def _layer_norm(self, x: Array, g: Array, b: Array, xp: Namespace, eps: float = 1e-5) -> Array:
        norm, reads = self._norms.pop(0) if self._norms else ("", "")
        self._note(reads, x, xp)
        is_wanted = not self._wanted.isdisjoint((f"{norm}.hook_scale", f"{norm}.hook_normalized"))
        if is_wanted and "layer_norm" not in changed_parts(xp):  # Another one may divide by other numbers.
            wide = at_least_float32(x, xp)
            centered = wide - xp.mean(wide, axis=-1, keepdims=True)
            scale = xp.sqrt(xp.mean(centered * centered, axis=-1, keepdims=True) + eps)
            self._note(f"{norm}.hook_scale", scale, xp)
            self._note(f"{norm}.hook_normalized", centered / scale, xp)
        return transformer.layer_norm(x, g, b, xp=xp, eps=eps)

    def _mha(self, x: Array, xp: Namespace, **rest: Any) -> tuple[Array, Past]:
        attended, past = transformer.mha(x, **rest, xp=xp)
        self._note(f"blocks.{self._layer}.hook_attn_out", attended, xp)
        return attended, past

    def _attention(self, q: Array, k: Array, v: Array, mask: Array, xp: Namespace) -> Array:
        z = transformer.attention(q, k, v, mask, xp)
        for name, x in zip("qkvz", (q, k, v, z), strict=True):
            heads = xp.permute_dims(x, (0, 2, 1, 3))  # [batch, n_seq, n_head, d_head]
            self._keep(f"blocks.{self._layer}.attn.hook_{name}", heads, (*self._shape, *heads.shape[2:]), xp)
        return z

    def _softmax(self, x: Array, xp: Namespace) -> Array:
        weights = transformer.softmax(x, xp)  # [batch, n_head, n_seq, n_seq]
        shape = (*self._shape[:-1], *x.shape[1:])
        self._keep(f"blocks.{self._layer}.attn.hook_attn_scores", x, shape, xp)
        self._keep(f"blocks.{self._layer}.attn.hook_pattern", weights, shape, xp)
        return weights

    def _ffn(self, x: Array, xp: Namespace, **rest: Any) -> Array:
        x = transformer.ffn(x, **rest, xp=xp)
        self._note(f"blocks.{self._layer}.hook_mlp_out", x, xp)
        return x

    def _gelu(self, x: Array, xp: Namespace) -> Array:
        self._note(f"blocks.{self._layer}.mlp.hook_pre", x, xp)
        x = transformer.gelu(x, xp)
        self._note(f"blocks.{self._layer}.mlp.hook_post", x, xp)
        return x

    def _note(self, name: str, x: Array, xp: Namespace) -> None:
        """Keep `x` [rows, n] as [..., n_seq, n], if it is wanted."""
        self._keep(name, x, (*self._shape, x.shape[-1]), xp)

    def _keep(self, name: str, x: Array, shape: tuple[int, ...], xp: Namespace) -> None:
        if name in self.found:
            raise _other_part(name, "computes more than once")
        if name in self._wanted:
            self.found[name] = xp.reshape(x, shape)


def _other_part(name: str, what: str) -> SettingError:
    return SettingError(f"a part of the model was replaced by one that {what} {name}: leave this name out")
