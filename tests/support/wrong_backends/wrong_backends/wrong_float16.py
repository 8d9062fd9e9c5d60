"""Products whose factors are rounded to float16, whatever dtype was asked for."""

from typing import Any

import numpy as np

from wrong_backends import NumPyWith


class WrongFloat16(NumPyWith):
    """Products whose factors are rounded to float16, whatever dtype was asked for."""

    name = "wrong-float16"

    def __init__(self, **settings: Any) -> None:
        super().__init__({"matmul": lambda a, b: np.matmul(rounded(a), rounded(b))}, **settings)


def rounded(x: Any) -> Any:
    """Keep 11 bits of each number."""
    return x.astype(np.float16).astype(x.dtype)
