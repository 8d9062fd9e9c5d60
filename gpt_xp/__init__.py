"""GPT-2, written once against the Python array API standard.

    model = gpt_xp.load(backend="numpy")
    print(model.generate("ROMEO:").text)

`gpt_xp.gpt2` and `gpt_xp.lm_loss` are the model as pure functions, for any array library.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpt_xp.api import Model, load, save
from gpt_xp.backend import Backend, BackendInfo, backends
from gpt_xp.cache import KVCache, new_cache
from gpt_xp.config import SIZES, GPT2Config
from gpt_xp.errors import GptXpError
from gpt_xp.model import gpt2, hidden_states, lm_loss, unembed
from gpt_xp.picogpt import load_encoder_hparams_and_params, shape_tree
from gpt_xp.quantization import quantize
from gpt_xp.results import Generation, Piece, Stats
from gpt_xp.scoring import RankedChoice, Score
from gpt_xp.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt_xp.comparison import Comparison, compare
    from gpt_xp.tokenizer_training import train_tokenizer
    from gpt_xp.training import Evaluation, Training, train

__all__ = [
    "SIZES",
    "Backend",
    "BackendInfo",
    "Comparison",
    "Evaluation",
    "GPT2Config",
    "Generation",
    "GptXpError",
    "KVCache",
    "Model",
    "Piece",
    "RankedChoice",
    "Score",
    "Stats",
    "Tokenizer",
    "Training",
    "backends",
    "compare",
    "gpt2",
    "hidden_states",
    "lm_loss",
    "load",
    "load_encoder_hparams_and_params",
    "new_cache",
    "quantize",
    "save",
    "shape_tree",
    "train",
    "train_tokenizer",
    "unembed",
]

# What generating a text does not need is imported when it is first asked for, or each start would wait for it.
_LATER = {
    "Comparison": "gpt_xp.comparison",
    "Evaluation": "gpt_xp.training",
    "Training": "gpt_xp.training",
    "compare": "gpt_xp.comparison",
    "train": "gpt_xp.training",
    "train_tokenizer": "gpt_xp.tokenizer_training",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
