"""The random numbers of sampling, which are the same on every backend and in a batch of any size.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is a function of a key and a counter, without
a state. The key is (seed, sample) and the counter is (block, step, 0, 0). So the noise of a token depends only on the
seed, the number of the sample, the step, and the token's id.
"""

from typing import Any

import numpy as np


def gumbel_noise(
    seed: int, sample: int, step: int, n_vocab: int, ids: "np.ndarray[Any, Any] | None" = None
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return [n_vocab] float32 draws of the standard Gumbel distribution (Gumbel 1954), or only those of `ids`.

    The argmax of logits plus this noise is a sample from their softmax. The draws are computed in float64 on the host,
    from 32 bits each, and rounded once.
    """
    key, counter = np.array([seed, sample], dtype=np.uint64), np.array([0, step, 0, 0], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((n_vocab + 1) // 2)
    bits = raw.astype("<u8", copy=False).view("<u4")[:n_vocab]
    if ids is not None:
        bits = bits[ids]
    # x is the middle of one of 2^32 equal parts of (0, 1): never 0 or 1, and exact in float64.
    x = (2.0**32 - 0.5 - bits) * 2.0**-32
    for _ in range(2):  # -log(-log(x)) in place, because making new arrays would take as long as the logarithms.
        np.negative(np.log(x, out=x), out=x)
    return x.astype(np.float32)
