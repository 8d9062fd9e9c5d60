"""nanoGPT's recipe, written anew: a plain module with torch's fused attention, and its fused AdamW.

The GELU is GPT-2's own, in its tanh form, so that all train the same function; nanoGPT takes the exact one. Not through
torch.compile, which nanoGPT's recipe for CPUs switches off.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812, its usual name

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from training import in_torch


class Block(nn.Module):
    """Attention and feed-forward network, each on a normalized copy, and added."""

    def __init__(self, n: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.c_attn, self.attn_proj = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.c_fc, self.mlp_proj = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, n_seq, n] -> the same."""
        batch, n_seq, n = x.shape
        heads = self.c_attn(self.ln_1(x)).view(batch, n_seq, 3, self.n_head, n // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(batch, n_seq, n))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The model, with the token table as the last layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of int64 [batch, n_seq] tokens."""
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class Trainer:
    """The model in training."""

    def __init__(self, folder: Path, batch: int) -> None:
        config = read_config(folder)
        self.model = GPT(config)
        load(self.model, read_params(folder, config))
        self.optimizer = in_torch.adamw(self.model, fused=True)

    def describe(self) -> str:
        """Return torch's version."""
        return f"{in_torch.version()}, fused attention and AdamW"

    def step(self, tokens: Any) -> float:
        """Take a step, and return its loss."""
        return in_torch.step(self.model, self.optimizer, tokens, self.model)


@torch.no_grad()
def load(model: GPT, params: Any) -> None:
    """Copy gpt-xp's params into the model."""

    def linear(layer: nn.Linear, leaf: Any) -> None:
        layer.weight.copy_(torch.tensor(leaf["w"].T))
        layer.bias.copy_(torch.tensor(leaf["b"]))

    def norm(layer: nn.LayerNorm, leaf: Any) -> None:
        layer.weight.copy_(torch.tensor(leaf["g"]))
        layer.bias.copy_(torch.tensor(leaf["b"]))

    model.wte.weight.copy_(torch.tensor(params["wte"]))
    model.wpe.weight.copy_(torch.tensor(params["wpe"]))
    norm(model.ln_f, params["ln_f"])
    for block, leaves in zip(model.blocks, params["blocks"], strict=True):
        norm(block.ln_1, leaves["ln_1"])
        norm(block.ln_2, leaves["ln_2"])
        linear(block.c_attn, leaves["attn"]["c_attn"])
        linear(block.attn_proj, leaves["attn"]["c_proj"])
        linear(block.c_fc, leaves["mlp"]["c_fc"])
        linear(block.mlp_proj, leaves["mlp"]["c_proj"])
