"""A cache that is written one slot too far, around its ring."""

from typing import Any

import numpy as np

import wrong_backends
from gpt_xp import Backend
from gpt_xp import kv_cache as cache
from gpt_xp.backend import BackendInfo

NAME = "wrong-cache"


def info() -> BackendInfo:
    """Return what it is."""
    return wrong_backends.info(NAME)


def create(**settings: Any) -> Backend:
    """Return the backend; the settings are NumPy's. It spoils the cache of the whole process."""
    cache.KVCache.write = write
    return wrong_backends.numpy_with(NAME, settings)


def write(self: Any, layer: int, k: Any, v: Any, xp: Any) -> Any:
    """Put keys and values [batch, n_head, n_seq, d_head] where the token after theirs belongs."""
    slots = (self.position + 1 + np.arange(k.shape[2])) % self.n_slots
    self.k[layer][:, :, slots] = k
    self.v[layer][:, :, slots] = v
    return self
