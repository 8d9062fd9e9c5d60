"""The settings of a training run, which are checked before any work and kept in `run.json`."""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.mesh import parse_mesh
from gpt_xp.reporting.text import listed

# The default shape of a model from scratch, which is that of the bundled model.
SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 192, "n_ctx": 256}
VOCAB_SIZE = 1024
SEQ_LEN = 256  # No default is longer, because the memory of attention grows with its square.
CHANGEABLE = (
    "device",
    "mesh",
    "threads",
    "plot",
    "sample",
)  # A resumed run may change these settings, because no result depends on them.


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a run; see `gpt_xp.train`. Raises `SettingError` for values that make no sense."""

    data: tuple[str, ...]
    val: tuple[str, ...] = ()
    val_fraction: float = 0.1
    start: str | None = None
    freeze: int = 0
    tokenizer: str | None = None
    vocab_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    n_ctx: int | None = None
    seq_len: int | None = None
    special_tokens: bool = False

    steps: int = 2000
    batch_size: int = 4  # Times 4 below: XLA allocates the memory of a batch anew in each step, which takes long.
    accumulate: int = 4
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.1  # part of learning_rate at the end
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    weight_dropout: float = 0.0
    average: float = 0.0
    eval_every: int = 250
    eval_tokens: int = 1_000_000
    patience: int | None = 10
    seed: int = 0

    sample: str | None = None
    plot: str | None = None
    save_dtype: str = "float32"
    dtype: str = "float32"
    device: str | None = None
    mesh: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        # Paths are absolute, because a run may be resumed in another directory. JSON gives lists where tuples are due.
        for name in ("data", "val"):
            object.__setattr__(self, name, tuple(os.path.abspath(str(file)) for file in listed(getattr(self, name))))
        if self.plot is not None:
            object.__setattr__(self, "plot", os.path.abspath(str(self.plot)))
        if not self.data:
            raise SettingError("there is nothing to train on: name the files of text (data)")
        _check_counts(self)
        _check_ranges(self)
        if self.dtype not in ("float32", "bfloat16"):  # In float16 gradients vanish or overflow.
            raise SettingError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        if self.save_dtype not in ("float32", "float16"):
            raise SettingError(f"save_dtype must be float32 or float16, not {self.save_dtype!r}")
        if self.mesh is not None and parse_mesh(self.mesh).model > 1:
            raise SettingError(f"mesh must be data=N or auto for training, which splits the batch, not {self.mesh!r}")
        if self.start is None and self.freeze:
            raise SettingError("freeze keeps blocks of a trained model: name the model to start from (start)")
        given = [name for name in ("tokenizer", "vocab_size", *SHAPE) if getattr(self, name) is not None]
        if self.start is not None and given:
            raise SettingError(f"{given[0]} is that of the model to start from: leave it out, or train from scratch")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise SettingError("tokenizer and vocab_size exclude each other: give one, or the size of one to train")

    @property
    def source(self) -> str | None:
        """The name or directory of the model to start from, or else of the tokenizer; None without either."""
        return self.tokenizer if self.start is None else self.start

    def new_config(self, n_vocab: int, eos_token_id: int | None = None, bos_token_id: int | None = None) -> GPT2Config:
        """Return the config of a model from scratch. Raises `ConfigError` for impossible sizes."""
        sizes = {name: default if (value := getattr(self, name)) is None else value for name, default in SHAPE.items()}
        return GPT2Config(n_vocab=n_vocab, eos_token_id=eos_token_id, bos_token_id=bos_token_id, **sizes)

    def row_length(self, config: GPT2Config) -> int:
        """Return how many tokens each row of a batch predicts. Raises `SettingError` where they exceed the context."""
        length = min(config.n_ctx, SEQ_LEN) if self.seq_len is None else self.seq_len
        if length > config.n_ctx:
            raise SettingError(
                f"seq_len {length} is more than the context of this model, {config.n_ctx} tokens (n_ctx)"
            )
        return length

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of values that JSON can hold."""
        return dataclasses.asdict(self)


def _check_counts(settings: TrainingSettings) -> None:
    least = {"warmup": 0, "freeze": 0, "seed": 0}
    optional = ("vocab_size", *SHAPE, "seq_len", "patience", "threads")
    for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_tokens", *least, *optional):
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 1):
            raise SettingError(f"{name} must be a whole number of at least {least.get(name, 1)}, not {value!r}")
    if settings.seed >= 2**63:
        raise SettingError(f"seed must be below 2**63, not {settings.seed}")


def _check_ranges(settings: TrainingSettings) -> None:
    below = math.inf
    ranges = {  # the least value, and the bound that it must stay below
        "learning_rate": (0, below), "min_learning_rate": (0, 1 + 1e-9), "weight_decay": (0, below), "clip": (0, below),
        "beta1": (0, 1), "beta2": (0, 1), "weight_dropout": (0, 1), "average": (0, 1), "val_fraction": (0, 1),
    }  # fmt: skip
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < most:
            top = "" if most == below else f" and below {most:g}" if most == 1 else " and at most 1"
            raise SettingError(f"{name} must be a number of at least {least}{top}, not {value!r}")
    for name in ("learning_rate", "clip", *(() if settings.val else ("val_fraction",))):
        if getattr(settings, name) == 0:
            raise SettingError(f"{name} must be more than 0")
