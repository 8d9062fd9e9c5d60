"""Numbers for CUDA kernels, and how exact their results must be."""

from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_on_cpu import amid_nan

from gpt_xp.tolerances import TOLERANCE

TOLERANCES = {
    "float16": TOLERANCE["layer", "float16"],  # rounded once, at the end
    "float32": TOLERANCE["same", "float32"],
    "float64": TOLERANCE["same", "float64"],
}


def numbers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    made = amid_nan(shape, dtype)
    made[...] = np.random.RandomState(seed).standard_normal(shape)
    return made


def in_sixteenths(x: np.ndarray) -> np.ndarray:
    """Round numbers, so that sums of them and of hundreds are exact in float32."""
    x[...] = np.round(x * 16) / 16
    return x


class Counted(np.ndarray):
    """An array of which `n` counts what CuPy would launch a kernel for: all that makes no view."""

    n = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return count(getattr(ufunc, method), *inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return count(function, *args, **kwargs)

    def __setitem__(self, *args: Any) -> None:
        count(np.ndarray.__setitem__, self, *args)

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return count(np.ndarray.astype, self, *args, **kwargs)


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args = tuple(each.view(np.ndarray) if isinstance(each, Counted) else each for each in args)
    result = function(*args, **kwargs)
    Counted.n += not any(np.may_share_memory(result, each) for each in args if isinstance(each, np.ndarray))
    return None if result is None else np.asarray(result).view(Counted)
