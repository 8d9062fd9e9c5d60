"""A cache that is written one slot too far, around its ring."""

from typing import Any

import numpy as np

from gpt_xp import kv_cache
from wrong_backends import NumPyWith


class WrongCache(NumPyWith):
    """A cache that is written one slot too far, around its ring."""

    name = "wrong-cache"

    def __init__(self, **settings: Any) -> None:
        super().__init__({}, **settings)
        kv_cache.LayerCache.append = append  # It spoils the cache of the whole process.


def append(self: Any, k: Any, v: Any, xp: Any) -> Any:
    """Put keys and values [batch, n_head, n_seq, d_head] where the token after theirs belongs."""
    slots = (self.position + 1 + np.arange(k.shape[2])) % self.k.shape[1]
    all_k, all_v = (x.reshape((*k.shape[:2], *x.shape[1:])) for x in (self.k, self.v))
    all_k[:, :, slots] = k
    all_v[:, :, slots] = v
    return self, all_k, all_v
