"""What someone who comes from Jay Mody's "GPT in 60 Lines of NumPy" (picoGPT) looks for, under the names used there."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp._tree import tree_map
from gpt_xp._typing import Params
from gpt_xp.checkpoint import read_config, read_params
from gpt_xp.errors import SettingError
from gpt_xp.hub import find_in_models_dir
from gpt_xp.tokenizer import Tokenizer


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str | Path
) -> tuple[Tokenizer, dict[str, int], Params]:
    """Return what picoGPT's function of that name (`utils.py`) returns, from its folder `models_dir/model_size`.

    That is a tokenizer with `encode` and `decode`; n_vocab, n_ctx, n_embd, n_head, n_layer; and the params as NumPy
    arrays of one's own, float32 as OpenAI stored them, for `gpt2(token_ids, **params, n_head=hparams["n_head"])`. Where
    the folder has no model, OpenAI's files are fetched into it; TensorFlow reads them, the first time only.

    Raises `ModelNotFoundError`, `DownloadError`, `CheckpointError`, `ConfigError`, `TokenizerError`.
    """
    folder = find_in_models_dir(model_size, models_dir)
    config = read_config(folder)
    params = read_params(folder, config, dtype=None)
    hparams = dataclasses.asdict(config)
    del hparams["eos_token_id"], hparams["bos_token_id"]
    return Tokenizer.from_directory(folder), hparams, tree_map(np.array, params)


def shape_tree(params: Any) -> Any:
    """The same tree of dicts and lists with each array, of any library, replaced by the list of its sizes.

    So the blog post prints what a model is made of. Raises `SettingError` for a leaf that has no shape.
    """
    return tree_map(_sizes, params)


def _sizes(leaf: Any) -> list[int]:
    if not hasattr(leaf, "shape"):
        raise SettingError(f"a tree of arrays was expected, in dicts and lists; it holds {leaf!r:.80}, no array")
    return list(leaf.shape)
