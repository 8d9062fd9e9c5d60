"""Softmax without the maximum: it overflows where attention's scores are large."""

from typing import Any

import numpy as np

from wrong_backends import NumPyWith


class WrongSoftmax(NumPyWith):
    """Softmax without the maximum: it overflows where attention's scores are large."""

    name = "wrong-softmax"

    def __init__(self, **settings: Any) -> None:
        super().__init__({"max": no_maximum}, **settings)

    def compile(self, function: Any, *static: Any, **options: Any) -> Any:
        """Return the function without the flags of an overflow: an accelerator overflows without a word."""
        return np.errstate(over="ignore", invalid="ignore")(super().compile(function, *static, **options))


def no_maximum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Return zeros for attention's scores, [batch, n_head, n_q, n_k]; for everything else what NumPy does."""
    largest = np.max(x, axis=axis, keepdims=keepdims)
    return np.zeros_like(largest) if x.ndim == 4 else largest
