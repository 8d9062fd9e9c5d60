"""The functions of picoGPT (Jay Mody's "GPT in 60 Lines of NumPy") that load a model, under the same names."""

from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp.checkpoint import checkpoint
from gpt_xp.errors import SettingError
from gpt_xp.hub.find import find_in_models_dir
from gpt_xp.quantization import Quantized, QuantizedTable, dequantize
from gpt_xp.registry import get_backend
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tree import tree_map
from gpt_xp.types import Params


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str | Path
) -> tuple[Tokenizer, dict[str, int], Params]:
    """Return encoder, hparams and params from picoGPT's folder `models_dir/model_size`, as its `utils.py` does.

    The encoder is a tokenizer with `encode` and `decode`. The hparams are n_vocab, n_ctx, n_embd, n_head, n_layer. The
    params are copies as NumPy arrays of float32, for `gpt2(token_ids, **params, n_head=hparams["n_head"])`.
    `model_size` may also be a bundled model ("shakespeare"). If the folder has no model, OpenAI's files are fetched
    into it, and TensorFlow reads them once. Without TensorFlow, the Hub's files are fetched instead.

    Raises `ModelNotFoundError`, `DownloadError`, `CheckpointError`, `ConfigError` and `TokenizerError`.
    """
    found = checkpoint.read(find_in_models_dir(model_size, models_dir), "float32")
    hparams = {name: getattr(found.config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    return found.tokenizer, hparams, tree_map(_own_float32, found.params)


def _own_float32(leaf: Any) -> "np.ndarray[Any, Any]":
    """Return a float32 copy of an array, or of a quantized weight after dequantizing it."""
    if isinstance(leaf, Quantized):
        table = dequantize(leaf, np.float32, get_backend("numpy").xp)
        leaf = table if isinstance(leaf, QuantizedTable) else table.T
    return np.array(leaf, dtype=np.float32, order="C")


def shape_tree(params: Any) -> Any:
    """Return the same tree of dicts and lists with each array, of any library, replaced by the list of its sizes.

    The blog post prints params in this way. Raises `SettingError` for a leaf that has no shape.
    """
    return tree_map(_sizes, params)


def _sizes(leaf: Any) -> list[int]:
    if not hasattr(leaf, "shape"):
        raise SettingError(f"a tree of arrays was expected, in dicts and lists; it holds {leaf!r:.80}, no array")
    return list(leaf.shape)
