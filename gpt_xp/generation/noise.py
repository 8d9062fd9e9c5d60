"""The randomness of sampling: the same numbers on every backend, and in a batch of any size.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is a function of a key and a counter, with
no state to carry along. The key is (seed, sample) and the counter is (block, step, 0, 0), so the noise of a token
depends on nothing but the seed, which sample of its prompt this is, the step, and the token's id.
"""

from typing import Any

import numpy as np


def gumbel_noise(
    seed: int, sample: int, step: int, n_vocab: int, ids: "np.ndarray[Any, Any] | None" = None
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return [n_vocab] float32 draws of the standard Gumbel distribution (Gumbel 1954), or those of `ids` alone.

    Adding them to logits and taking the largest samples from their softmax. They are computed in float64 on the host,
    from 32 bits each, and rounded once.
    """
    key, counter = np.array([seed, sample], dtype=np.uint64), np.array([0, step, 0, 0], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((n_vocab + 1) // 2)
    bits = raw.astype("<u8", copy=False).view("<u4")[:n_vocab]
    if ids is not None:
        bits = bits[ids]
    # From 1, the distance of the middle of one of 2^32 equal parts: never 0 or 1, and exact in float64.
    x = (2.0**32 - 0.5 - bits) * 2.0**-32
    for _ in range(2):  # -log(-log(x)), in place: a new array for each function would take as long as the logarithms
        np.negative(np.log(x, out=x), out=x)
    return x.astype(np.float32)
