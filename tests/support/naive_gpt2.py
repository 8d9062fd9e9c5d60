"""A second GPT-2, as simple as possible, in float64: one head and one position at a time, no mask, no batch.

The functions have picoGPT's arguments (`**block`, `**params`), and share no code with gpt-xp.
"""

import math

import numpy as np


def gelu(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(inner)) / 2


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def layer_norm(x, g, b):
    rows = [(row - row.mean()) / math.sqrt(row.var() + 1e-5) for row in x]
    return np.array(rows) * g + b


def linear(x, w, b):
    return np.array([row @ w + b for row in x])


def mha(x, c_attn, c_proj, n_head):
    n_seq, n_embd = x.shape
    size = n_embd // n_head
    qkv = linear(x, **c_attn)
    mixed = np.empty_like(x)
    for head in range(n_head):
        q, k, v = (qkv[:, part * n_embd + head * size :][:, :size] for part in range(3))
        for i in range(n_seq):
            weights = softmax(k[: i + 1] @ q[i] / math.sqrt(size))
            mixed[i, head * size : (head + 1) * size] = weights @ v[: i + 1]
    return linear(mixed, **c_proj)


def ffn(x, c_fc, c_proj):
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    """Return the logits [n_seq, n_vocab] of token ids [n_seq]."""
    wte, wpe = np.float64(wte), np.float64(wpe)
    x = np.array([wte[token] + wpe[place] for place, token in enumerate(inputs)])
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T
