"""GPT-2's forward pass: all the mathematics, in the Python array API standard alone.

Every function is pure, so it runs unchanged on NumPy, CuPy, JAX (with `jit`, `grad`, `vmap`) and other libraries. `xp`
is the library's namespace. Read it from the bottom up. Weights have the checkpoint's names, so `**block` matches the
arguments. A function marked `@part` can be replaced (`gpt_xp.with_parts`). Sources: Radford et al. 2019, section 2.3,
and its code, openai/gpt-2 `src/model.py`; Vaswani et al. 2017; Jay Mody, "GPT in 60 Lines of NumPy".
"""

import math

from array_api_compat import array_namespace

from gpt_xp.arrays import at_least_float32, namespace_of
from gpt_xp.config import GPT2Config
from gpt_xp.kv_cache import KVCache, Past, positions_and_mask
from gpt_xp.parts import part
from gpt_xp.types import Array, Namespace, Params


@part
def gelu(x: Array, xp: Namespace) -> Array:
    """Return the Gaussian error linear unit of each number, in its tanh form (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@part
def softmax(x: Array, xp: Namespace) -> Array:
    """Return exponentials that sum to one over the last axis. Subtracting the maximum prevents overflow."""
    x = at_least_float32(x, xp)
    exp_x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return exp_x / xp.sum(exp_x, axis=-1, keepdims=True)


@part
def layer_norm(x: Array, g: Array, b: Array, xp: Namespace, eps: float = 1e-5) -> Array:
    """Normalize the last axis to mean 0 and (biased) variance 1, then scale by `g` and add `b` (Ba et al. 2016)."""
    wide = at_least_float32(x, xp)
    centered = wide - xp.mean(wide, axis=-1, keepdims=True)
    variance = xp.mean(centered * centered, axis=-1, keepdims=True)
    return xp.astype(g * (centered / xp.sqrt(variance + eps)) + b, x.dtype, copy=False)


@part
def linear(x: Array, w: Array, b: Array, xp: Namespace) -> Array:
    """Multiply by the weight and add the bias: [rows, n_in] @ [n_in, n_out] + [n_out] -> [rows, n_out]."""
    return xp.matmul(x, w) + b


@part
def attention(q: Array, k: Array, v: Array, mask: Array, xp: Namespace) -> Array:
    """Return averages of the rows of `v`, weighted by the softmax of the scores of `q` with `k` plus the mask."""
    q = q / math.sqrt(q.shape[-1])  # Scaled before the product, there are fewer numbers, and float16 does not overflow.
    scores = xp.matmul(q, xp.matrix_transpose(k)) + mask  # [..., n_q, d] @ [..., d, n_k] -> [..., n_q, n_k]
    weights = xp.astype(softmax(scores, xp), v.dtype, copy=False)
    return xp.matmul(weights, v)  # [..., n_q, n_k] @ [..., n_k, d] -> [..., n_q, d]


@part
def mha(
    x: Array, c_attn: Params, c_proj: Params, n_head: int, mask: Array, past: Past, xp: Namespace
) -> tuple[Array, Past]:
    """Return causal self-attention with `n_head` heads, over these tokens and the past, and the new past."""
    qkv = linear(x, **c_attn, xp=xp)  # [rows, n_embd] -> [rows, 3 * n_embd], where rows = batch * n_seq
    qkv = xp.reshape(qkv, (-1, mask.shape[-2], 3, n_head, x.shape[-1] // n_head))  # [batch, n_seq, 3, n_head, d_head]
    qkv = xp.permute_dims(qkv, (2, 0, 3, 1, 4))  # [3, batch, n_head, n_seq, d_head]
    q, k, v = qkv[0, ...], qkv[1, ...], qkv[2, ...]  # each [batch, n_head, n_seq, d_head]
    if past is not None:
        past, k, v = past.append(k, v, xp)  # k and v: [batch, n_head, n_slots, d_head]
    heads = attention(q, k, v, mask, xp)  # [batch, n_head, n_seq, d_head]
    merged = xp.reshape(xp.permute_dims(heads, (0, 2, 1, 3)), x.shape)  # [rows, n_embd]
    return linear(merged, **c_proj, xp=xp), past


@part
def ffn(x: Array, c_fc: Params, c_proj: Params, xp: Namespace) -> Array:
    """Apply the feed-forward network to each row: expand to four times the width, GELU, and project back."""
    x = gelu(linear(x, **c_fc, xp=xp), xp)  # [rows, n_embd] -> [rows, 4 * n_embd]
    return linear(x, **c_proj, xp=xp)  # [rows, 4 * n_embd] -> [rows, n_embd]


@part
def transformer_block(
    x: Array, mlp: Params, attn: Params, ln_1: Params, ln_2: Params, n_head: int, mask: Array, past: Past, xp: Namespace
) -> tuple[Array, Past]:
    """Add attention, then the feed-forward network, to `x` [rows, n_embd]; each reads a normalized copy."""
    attended, past = mha(layer_norm(x, **ln_1, xp=xp), **attn, n_head=n_head, mask=mask, past=past, xp=xp)
    x = x + attended
    return x + ffn(layer_norm(x, **ln_2, xp=xp), **mlp, xp=xp), past


@part
def embed(tokens: Array, positions: Array, wte: Array, wpe: Array, xp: Namespace) -> Array:
    """Add the embeddings of tokens and of positions: [rows] and [rows] -> [rows, n_embd]."""
    return xp.take(wte, tokens, axis=0) + xp.take(wpe, positions, axis=0)


@part
def unembed(x: Array, wte: Array, xp: Namespace = None) -> Array:
    """Return logits over the vocabulary, computed with the token embeddings: [..., n_embd] -> [..., n_vocab]."""
    xp = xp or array_namespace(x, wte)
    rows = xp.reshape(x, (-1, x.shape[-1]))  # Products of 2-D arrays are faster.
    return xp.reshape(xp.matmul(rows, xp.matrix_transpose(wte)), (*x.shape[:-1], -1))


def hidden_states(
    params: Params, tokens: Array, config: GPT2Config, cache: KVCache | None = None, xp: Namespace = None
) -> tuple[Array, KVCache | None]:
    """Return the states that `unembed` turns into logits: [n_seq] or [batch, n_seq] -> [..., n_seq, n_embd], cache."""
    xp = namespace_of(params, tokens, config, xp)
    positions, mask = positions_and_mask(tokens, config, cache, xp)  # [rows], and [..., n_seq, n_slots]
    x = embed(xp.reshape(tokens, (-1,)), positions, params["wte"], params["wpe"], xp)  # [rows, n_embd]
    layers = []
    for i, block in enumerate(params["blocks"]):
        past = cache and cache.layer(i)
        x, past = transformer_block(x, **block, n_head=config.n_head, mask=mask, past=past, xp=xp)
        layers.append(past)
    x = layer_norm(x, **params["ln_f"], xp=xp)
    return xp.reshape(x, (*tokens.shape, -1)), cache and cache.after(layers, n_seq=tokens.shape[-1])


def gpt2(params: Params, tokens: Array, config: GPT2Config, xp: Namespace = None) -> Array:
    """Return the logits after each token: [n_seq] or [batch, n_seq] integers -> [..., n_seq, n_vocab]."""
    xp = namespace_of(params, tokens, config, xp)
    return unembed(hidden_states(params, tokens, config, xp=xp)[0], params["wte"], xp)


def gpt2_with_cache(
    params: Params, tokens: Array, config: GPT2Config, cache: KVCache, xp: Namespace = None
) -> tuple[Array, KVCache]:
    """Return the logits after each of the tokens [batch, n_seq] that follow those in the cache, and the new cache."""
    xp = namespace_of(params, tokens, config, xp)
    x, after = hidden_states(params, tokens, config, cache, xp)
    return unembed(x, params["wte"], xp), after or cache


def lm_loss(params: Params, tokens: Array, config: GPT2Config, xp: Namespace = None) -> Array:
    """Return the mean cross-entropy, in nats, of each token given those before it: [..., n_seq] -> a scalar."""
    xp = namespace_of(params, tokens, config, xp)
    logits = at_least_float32(gpt2(params, tokens[..., :-1], config, xp), xp)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    label = xp.take_along_axis(shifted, tokens[..., 1:, None], axis=-1)[..., 0]  # [..., n_seq - 1]
    return xp.mean(xp.log(xp.sum(xp.exp(shifted), axis=-1)) - label)
