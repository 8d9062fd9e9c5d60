"""Helpers for arrays of any library: device, library, precision, and a check of the arguments of `gpt2`."""

from typing import Any

import array_api_compat

from gpt_xp.config import check_config
from gpt_xp.errors import ConfigError, PromptError
from gpt_xp.types import Array, Namespace, Params


def device_of(x: Array) -> Any:
    """Return the device for new arrays that are used together with `x`. None leaves the choice to the library.

    It is None for arrays without a device (MLX), and for arrays that JAX spreads over several devices. Those have a
    sharding instead, which fits only arrays of the same rank. JAX moves a new array to where it is needed.
    """
    try:
        device = array_api_compat.device(x)
    except AttributeError:
        return None
    return None if hasattr(type(device), "device_set") else device


def at_least_float32(x: Array, xp: Namespace) -> Array:
    """Convert half precision to float32, because its sums lose digits or overflow. Return wider arrays unchanged."""
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


def namespace_of(params: Params, tokens: Array, config: Any, xp: Namespace) -> Namespace:
    """Return `xp`, or the namespace of the arrays if `xp` is None.

    Raises `ConfigError` for a config or params of the wrong type. Raises `PromptError` for tokens that are not an array
    of whole numbers, [n_seq] or [batch, n_seq], or belong to another library.
    """
    check_config(config)
    try:
        wte = params["wte"]
    except (TypeError, LookupError):
        raise ConfigError(
            f"params must be a dict of arrays with wte, wpe, blocks and ln_f, not {_kind(params)}: "
            "take those of gpt_xp.load(...).params"
        ) from None
    if "int" not in str(getattr(tokens, "dtype", "")):  # Every library has "int" in the names of its integer dtypes.
        raise _not_tokens(_kind(tokens))
    if len(tokens.shape) not in (1, 2):
        raise _not_tokens(f"an array of the shape {tuple(tokens.shape)}")
    try:
        return xp or getattr(wte, "namespace", None) or array_api_compat.array_namespace(tokens, wte)
    except TypeError:
        raise _not_tokens(f"{_kind(tokens)} beside weights that are {_kind(wte)}") from None


def _not_tokens(found: str) -> PromptError:
    return PromptError(
        "tokens must be an array of whole numbers, [n_seq] or [batch, n_seq], of the same library as the params, not "
        f"{found}: make one by that library's asarray"
    )


def _kind(x: Any) -> str:
    kind, dtype = type(x), getattr(x, "dtype", "")
    return f"{kind.__module__}.{kind.__qualname__} {dtype}".removeprefix("builtins.").strip()
