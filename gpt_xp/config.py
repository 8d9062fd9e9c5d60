"""The configuration of a GPT-2 model, and the published configurations by name."""

from dataclasses import dataclass
from typing import Any

from gpt_xp.errors import ConfigError, PromptError


@dataclass(frozen=True)
class GPT2Config:
    """The hyperparameters of a GPT-2; frozen and hashable, so that it can be a static argument of `jax.jit`.

    The names of sizes are those of OpenAI's `hparams.json`. `eos_token_id` is one token, or several, that end a
    generation. `bos_token_id` is the token that an empty prompt begins with. If one is None, the tokenizer's is used.
    Raises `ConfigError` for impossible sizes and ids.
    """

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12
    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))  # A list is not hashable.
        for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} cannot be split over n_head {self.n_head} heads: it must be a multiple of it"
            )
        for name, ids in (("eos_token_id", self.end_tokens), ("bos_token_id", (self.bos_token_id,))):
            if not all(id is None or type(id) is int for id in ids):
                raise ConfigError(f"{name} must be a token id or None, not {getattr(self, name)!r}")

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of `eos_token_id` as a tuple, which may be empty."""
        if isinstance(self.eos_token_id, tuple):
            return self.eos_token_id
        return () if self.eos_token_id is None else (self.eos_token_id,)

    @property
    def n_params(self) -> int:
        """The number of parameters. The token table is used twice and counted once."""
        n = self.n_embd
        return (self.n_vocab + self.n_ctx + 2) * n + self.n_layer * (12 * n + 13) * n

    def check_length(self, n_seq: int) -> None:
        """Raise `PromptError` unless `n_seq` tokens fit the context. Some array libraries would clamp positions."""
        if not 1 <= n_seq <= self.n_ctx:
            raise PromptError(f"{n_seq} tokens were given, and this model takes 1 to {self.n_ctx} (n_ctx) at a time")


def check_config(config: Any) -> None:
    """Raise `ConfigError` unless this is a `GPT2Config`. A dict of hparams is a common mistake."""
    if not isinstance(config, GPT2Config):
        raise ConfigError(
            f"config must be a gpt_xp.GPT2Config, not {type(config).__name__}: "
            "make one by gpt_xp.GPT2Config(n_vocab=..., n_ctx=..., n_embd=..., n_head=..., n_layer=...)"
        )


# The shapes are from Radford et al. 2019, table 2. The names use the parameter counts that OpenAI corrected later.
SIZES = {
    "124M": GPT2Config(n_embd=768, n_head=12, n_layer=12, eos_token_id=50256),
    "355M": GPT2Config(n_embd=1024, n_head=16, n_layer=24, eos_token_id=50256),
    "774M": GPT2Config(n_embd=1280, n_head=20, n_layer=36, eos_token_id=50256),
    "1558M": GPT2Config(n_embd=1600, n_head=25, n_layer=48, eos_token_id=50256),
}
