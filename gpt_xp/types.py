"""Names for types that differ between array libraries."""

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = Any  # an array of any library that follows the array API standard
NumpyArray: TypeAlias = npt.NDArray[Any]
Namespace: TypeAlias = Any  # the module with that library's functions: numpy, cupy, jax.numpy, array_api_strict, ...
Params: TypeAlias = dict[str, Any]  # {"wte", "wpe", "blocks": [{"ln_1", "attn", "ln_2", "mlp"}], "ln_f"}
