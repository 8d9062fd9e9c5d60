"""Names for the types that every array library has its own class of."""

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = Any  # an array of any library that follows the array API standard
NumpyArray: TypeAlias = npt.NDArray[Any]
Namespace: TypeAlias = Any  # the functions of that library: numpy, cupy, jax.numpy, array_api_strict ...
Params: TypeAlias = dict[str, Any]  # {"wte", "wpe", "blocks": [{"ln_1", "attn", "ln_2", "mlp"}], "ln_f"}
