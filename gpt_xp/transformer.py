"""GPT-2's forward pass: all the mathematics, and nothing else.

Every function is pure and is written in the Python array API standard alone, so it runs unchanged on NumPy,
CuPy, JAX (`jit`, `grad` and `vmap` included) and any other library that follows the standard. `xp` is that
library's namespace; leave it out and it is inferred from the arrays.

Read from the bottom up: `gpt2` is embeddings, a stack of `transformer_block`s, a last layer norm, and a product
with the token table. Names of weights are those of OpenAI's checkpoints, so `**block` fits the arguments. A function
marked `@part` can be replaced for an experiment, by `gpt_xp.with_parts`.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (section 2.3);
openai/gpt-2 `src/model.py`; Vaswani et al. 2017, "Attention Is All You Need"; Jay Mody, "GPT in 60 Lines of NumPy".
"""

import math
from collections.abc import Iterator

from array_api_compat import array_namespace

from gpt_xp.arrays import device_of, namespace_of
from gpt_xp.config import GPT2Config
from gpt_xp.kv_cache import KVCache
from gpt_xp.parts import part
from gpt_xp.types import Array, Namespace, Params


def at_least_float32(x: Array, xp: Namespace) -> Array:
    """Widen half precision, in which sums and squares lose digits or overflow; leave float32 and float64 alone."""
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


@part
def gelu(x: Array, xp: Namespace = None) -> Array:
    """Gaussian error linear unit, in its tanh form (Hendrycks & Gimpel 2016)."""
    xp = xp or array_namespace(x)
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: Array, xp: Namespace = None) -> Array:
    """Exponentials that sum to one over the last axis; the maximum is taken off first, so that none overflows."""
    xp = xp or array_namespace(x)
    x = at_least_float32(x, xp)
    exp_x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return exp_x / xp.sum(exp_x, axis=-1, keepdims=True)


@part
def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5, xp: Namespace = None) -> Array:
    """Mean 0 and (biased) variance 1 over the last axis, then scale `g` and shift `b` (Ba et al. 2016)."""
    xp = xp or array_namespace(x, g, b)
    wide = at_least_float32(x, xp)
    centered = wide - xp.mean(wide, axis=-1, keepdims=True)
    variance = xp.mean(centered * centered, axis=-1, keepdims=True)
    return xp.astype(g * (centered / xp.sqrt(variance + eps)) + b, x.dtype, copy=False)


@part
def linear(x: Array, w: Array, b: Array, xp: Namespace = None) -> Array:
    """Matrix product and shift: [rows, n_in] @ [n_in, n_out] + [n_out] -> [rows, n_out]."""
    xp = xp or array_namespace(x, w, b)
    return xp.matmul(x, w) + b


def mask_of(visible: Array, xp: Namespace) -> Array:
    """What to add to attention's scores: 0 where a token may look, and the smallest float32 where it may not."""
    # Finite: a row that may look nowhere (padding) stays free of NaN.
    lowest = float(xp.finfo(xp.float32).min)
    return lowest * xp.astype(~visible, xp.float32)


@part
def attention(q: Array, k: Array, v: Array, mask: Array, xp: Namespace = None) -> Array:
    """Mix the rows of `v` by how well each `q` matches each `k`; `mask` forbids where to look."""
    xp = xp or array_namespace(q, k, v)
    q = q / math.sqrt(q.shape[-1])  # before the product: fewer numbers, and half precision does not overflow
    # [..., n_q, d] @ [..., d, n_k] -> [..., n_q, n_k], in float32 at least, which is the mask's dtype
    weights = softmax(xp.matmul(q, xp.matrix_transpose(k)) + mask, xp)
    return xp.matmul(xp.astype(weights, v.dtype, copy=False), v)  # [..., n_q, n_k] @ [..., n_k, d] -> [..., n_q, d]


@part
def mha(
    x: Array,
    c_attn: Params,
    c_proj: Params,
    n_head: int,
    mask: Array,
    cache: KVCache | None = None,
    layer: int = 0,
    window: int | None = None,
    xp: Namespace = None,
) -> tuple[Array, KVCache | None]:
    """Multi-head causal self-attention; with a cache, over all the tokens that it remembers."""
    xp = xp or array_namespace(x)
    (rows, n_embd), n_seq = x.shape, mask.shape[-2]  # rows = batch * n_seq
    qkv = linear(x, **c_attn, xp=xp)  # [rows, n_embd] -> [rows, 3 * n_embd]
    qkv = xp.reshape(qkv, (-1, n_seq, 3, n_head, n_embd // n_head))  # [batch, n_seq, 3, n_head, d_head]
    qkv = xp.permute_dims(qkv, (2, 0, 3, 1, 4))  # [3, batch, n_head, n_seq, d_head]
    q, k, v = qkv[0, ...], qkv[1, ...], qkv[2, ...]  # each [batch, n_head, n_seq, d_head]
    if cache is not None:
        cache = cache.write(layer, k, v, xp)
        k, v = cache.read(layer, window)  # each [batch, n_head, window, d_head]
    heads = attention(q, k, v, mask, xp)  # [batch, n_head, n_seq, d_head]
    merged = xp.reshape(xp.permute_dims(heads, (0, 2, 1, 3)), (rows, n_embd))  # [rows, n_embd]
    return linear(merged, **c_proj, xp=xp), cache  # [rows, n_embd] -> [rows, n_embd]


@part
def ffn(x: Array, c_fc: Params, c_proj: Params, xp: Namespace = None) -> Array:
    """Position-wise feed-forward network: up to four times the width, GELU, and down again."""
    xp = xp or array_namespace(x)
    x = gelu(linear(x, **c_fc, xp=xp), xp)  # [rows, n_embd] -> [rows, 4 * n_embd]
    return linear(x, **c_proj, xp=xp)  # [rows, 4 * n_embd] -> [rows, n_embd]


@part
def transformer_block(
    x: Array,
    ln_1: Params,
    attn: Params,
    ln_2: Params,
    mlp: Params,
    n_head: int,
    mask: Array,
    cache: KVCache | None = None,
    layer: int = 0,
    window: int | None = None,
    xp: Namespace = None,
) -> tuple[Array, KVCache | None]:
    """Attention, then feed-forward, each on a normalized copy and added to `x` [rows, n_embd]."""
    xp = xp or array_namespace(x)
    looked, cache = mha(layer_norm(x, **ln_1, xp=xp), **attn, n_head=n_head, mask=mask,
                        cache=cache, layer=layer, window=window, xp=xp)  # fmt: skip
    x = x + looked
    x = x + ffn(layer_norm(x, **ln_2, xp=xp), **mlp, xp=xp)
    return x, cache


@part
def embed(tokens: Array, positions: Array, wte: Array, wpe: Array, xp: Namespace = None) -> Array:
    """Token embeddings plus position embeddings: [rows] and [rows] -> [rows, n_embd]."""
    xp = xp or array_namespace(tokens, wte, wpe)
    return xp.take(wte, tokens, axis=0) + xp.take(wpe, positions, axis=0)


@part
def unembed(x: Array, wte: Array, xp: Namespace = None) -> Array:
    """Logits over the vocabulary, by the token table itself: [..., n_embd] -> [..., n_vocab]."""
    xp = xp or array_namespace(x, wte)
    rows = xp.reshape(x, (-1, x.shape[-1]))  # [..., n_embd] -> [rows, n_embd]
    logits = xp.matmul(rows, xp.matrix_transpose(wte))  # [rows, n_embd] @ [n_embd, n_vocab] -> [rows, n_vocab]
    return xp.reshape(logits, (*x.shape[:-1], logits.shape[-1]))


def residual_stream(
    params: Params,
    tokens: Array,
    config: GPT2Config,
    cache: KVCache | None,
    window: int | None,
    xp: Namespace,
) -> Iterator[tuple[Array, KVCache | None]]:
    """The embedding and then the output of each block, [rows, n_embd], with the cache as it is by then."""
    n_seq = tokens.shape[-1]
    rows = xp.reshape(tokens, (-1,))  # [rows]: batch and sequence in one, for 2-D products are the fast ones
    if cache is None:
        config.check_length(n_seq)
        slots = xp.arange(n_seq, dtype=xp.int32, device=device_of(tokens))
        positions = xp.broadcast_to(slots, (rows.shape[0] // n_seq, n_seq))  # [batch, n_seq]
        visible = slots[None, :] <= slots[:, None]  # [n_seq, n_seq]: each looks at itself and back
    else:
        positions = cache.positions(n_seq, config.n_ctx, xp)  # [batch, n_seq]
        visible = cache.visible(n_seq, window, xp)  # [batch, 1, n_seq, window]
    mask = mask_of(visible, xp)

    x = embed(rows, xp.reshape(positions, (-1,)), params["wte"], params["wpe"], xp)  # [rows, n_embd]
    yield x, cache
    for layer, block in enumerate(params["blocks"]):
        x, cache = transformer_block(x, **block, n_head=config.n_head, mask=mask,
                                     cache=cache, layer=layer, window=window, xp=xp)  # fmt: skip
        yield x, cache


def hidden_states(
    params: Params,
    tokens: Array,
    config: GPT2Config,
    cache: KVCache | None = None,
    window: int | None = None,
    xp: Namespace = None,
) -> tuple[Array, KVCache | None]:
    """All of `gpt2` but the vocabulary product: [n_seq] or [batch, n_seq] tokens -> [..., n_seq, n_embd]."""
    xp = namespace_of(params, tokens, config, xp)
    for x, after in residual_stream(params, tokens, config, cache, window, xp):
        last, cache = x, after  # `comparison` looks at all of them; here the last one counts
    x = layer_norm(last, **params["ln_f"], xp=xp)
    return xp.reshape(x, (*tokens.shape, -1)), cache and cache.advance(tokens.shape[-1])


def gpt2(
    params: Params,
    tokens: Array,
    config: GPT2Config,
    cache: KVCache | None = None,
    window: int | None = None,
    xp: Namespace = None,
) -> Array:
    """Logits for the token after each: [..., n_seq] -> [..., n_seq, n_vocab]; with a cache, `(logits, cache)`."""
    xp = namespace_of(params, tokens, config, xp)
    x, cache = hidden_states(params, tokens, config, cache, window, xp)
    logits = unembed(x, params["wte"], xp)
    return logits if cache is None else (logits, cache)


def lm_loss(params: Params, tokens: Array, config: GPT2Config, xp: Namespace = None) -> Array:
    """Mean cross-entropy, in nats, of each token given those before it: [n_seq] or [batch, n_seq] -> a scalar."""
    xp = namespace_of(params, tokens, config, xp)
    logits = at_least_float32(gpt2(params, tokens[..., :-1], config, xp=xp), xp)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    label = xp.take_along_axis(shifted, tokens[..., 1:, None], axis=-1)[..., 0]  # [..., n_seq - 1]
    return xp.mean(xp.log(xp.sum(xp.exp(shifted), axis=-1)) - label)
