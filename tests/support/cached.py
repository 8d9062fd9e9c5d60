"""Runs the forward pass with a cache, chunk by chunk."""

import functools
from itertools import pairwise
from typing import Any

import numpy as np
from comparison import xp_of
from small_models import CONFIGS, small_params, small_tokens, tree_map

import gpt_xp
from gpt_xp import Backend, KVCache

CONFIG = CONFIGS["prime"]


PARAMS = small_params("prime")


TOKENS = small_tokens("prime")


def forward(backend: Backend) -> Any:
    """Return `gpt2` compiled by the backend."""
    return functools.partial(backend.compile(gpt_xp.gpt2, static=("config", "xp")), xp=xp_of(backend))


def forward_with_cache(backend: Backend) -> Any:
    return functools.partial(backend.compile(gpt_xp.gpt2_with_cache, static=("config", "xp")), xp=xp_of(backend))


def setup(backend: Backend, n_slots: int = 37, start: tuple[int, ...] = (0, 0, 0)) -> tuple[Any, KVCache]:
    params = tree_map(lambda leaf: backend.asarray(leaf, "float32"), PARAMS)
    first = backend.asarray(np.array(start, dtype=np.int32))
    return params, gpt_xp.new_cache(CONFIG, params["wte"], n_slots, first, backend.xp)


def run(
    backend: Backend, params: Any, cache: KVCache, tokens: np.ndarray, cuts: list[int], grow: bool = False
) -> tuple[np.ndarray, KVCache]:
    """Run tokens [batch, n_seq] in chunks that end at `cuts`; return all logits and the last cache.

    With `grow`, the cache grows with each chunk.
    """
    found = []
    for begin, end in pairwise([0, *cuts]):
        if grow and end > cache.n_slots:
            cache = backend.grow_cache(cache, end)
        logits, cache = forward_with_cache(backend)(params, backend.asarray(tokens[:, begin:end]), CONFIG, cache=cache)
        found.append(backend.to_numpy(logits))
    return np.concatenate(found, axis=1), cache
