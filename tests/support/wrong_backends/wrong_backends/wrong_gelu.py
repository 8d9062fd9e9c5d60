"""GELU in its exact form, x * Phi(x), where GPT-2 was trained with the one by tanh."""

import math
from typing import Any

import numpy as np

from wrong_backends import NumPyWith

CUBE = 0.044715  # GPT-2 takes tanh of sqrt(2 / pi) * (x + CUBE * x^3)
erf = np.vectorize(math.erf, otypes=[np.float64])


class WrongGelu(NumPyWith):
    """GELU in its exact form, x * Phi(x), where GPT-2 was trained with the one by tanh."""

    name = "wrong-gelu"

    def __init__(self, **settings: Any) -> None:
        super().__init__({"tanh": lambda u: erf(root(u) / math.sqrt(2)).astype(u.dtype)}, **settings)


def root(u: Any) -> Any:
    """Return, in float64, the x of which GELU made u: the one real root of the cubic, in its hyperbolic form."""
    q = np.asarray(u, dtype=np.float64) * math.sqrt(math.pi / 2) / CUBE  # x^3 + p x = q
    p = 1 / CUBE
    return 2 * math.sqrt(p / 3) * np.sinh(np.arcsinh(1.5 * q / p * math.sqrt(3 / p)) / 3)
