"""Weights in 8 or 4 bits. Decoding takes as long as reading all weights, so fewer bytes make it faster.

Only the token table and the weights of linear layers are quantized, which are almost all of the bytes. A weight is
codes times scales, rounded to the nearest code and symmetric around zero:

- int8: codes from -127 to 127, one per byte; a scale for each row of the token table and each output of a layer;
- int4: codes from -8 to 7, two per byte; a scale for each 32 codes of such a row.

Activations are not quantized, except by w8a8 and w4a8. They store int8 and int4, and round the input of each linear
layer to int8 while they compute: w8a8 with a scale for each row, w4a8 with one for each 32 numbers. That makes long
prompts faster, and the logits less exact.

`transformer.py` does not know about quantization. A backend provides a namespace whose `take`, `matrix_transpose` and
`matmul` take quantized weights too.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from gpt_xp.errors import NumericalError, SettingError
from gpt_xp.tree import leaves
from gpt_xp.types import Array, Namespace, Params

if TYPE_CHECKING:
    from gpt_xp.backend import Backend

STORED_KINDS = ("int8", "int4")
ROUNDING_KINDS = {"w8a8": "int8", "w4a8": "int4"}  # and how their weights are stored
KINDS = (*STORED_KINDS, *ROUNDING_KINDS)
GROUP = 32  # codes of int4 that share a scale
_WEIGHTS_AT_A_TIME = 2**20  # They are quantized while they are in the processor's cache.

Product: TypeAlias = Callable[[Array, "QuantizedWeight"], Array]


class QuantizedTable(NamedTuple):
    """A quantized token table [n_rows, n_columns].

    int8: `q` is [n_rows, n_columns] int8, and `scale` is [n_rows] float32. int4: `q` is [n_rows, n_columns / 2] uint8,
    and `scale` is [n_rows, n_columns / 32] float32. The 16 bytes of an int4 group hold its first 16 codes in their low
    bits and the other 16 in their high bits, each plus 8.
    """

    q: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the table."""
        return rows_and_columns(self)


class QuantizedWeight(NamedTuple):
    """The quantized weight of a linear layer [n_in, n_out], stored transposed: [n_out, n_in]."""

    q: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight in `matmul(x, w)`."""
        n_out, n_in = rows_and_columns(self)
        return n_in, n_out


Quantized: TypeAlias = QuantizedTable | QuantizedWeight


def kind_of(weight: Quantized) -> str:
    """Return "int8" or "int4"."""
    return "int8" if len(weight.scale.shape) == 1 else "int4"


def rows_and_columns(weight: Quantized) -> tuple[int, int]:
    """Return the shape in which a weight is stored."""
    rows, n_bytes = weight.q.shape
    return rows, n_bytes if kind_of(weight) == "int8" else 2 * n_bytes


def stored_shapes(kind: str, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `q` and `scale`. Raises `SettingError` for columns that the kind cannot hold."""
    if kind == "int8":
        return (rows, columns), (rows,)
    if columns % GROUP:
        raise SettingError(f"int4 needs widths that {GROUP} divides, and this model has one of {columns}: take int8")
    return (rows, columns // 2), (rows, columns // GROUP)


def n_bytes(weight: Quantized) -> int:
    """Return the bytes that a quantized weight takes."""
    return int(np.prod(weight.q.shape)) + 4 * int(np.prod(weight.scale.shape))


def check_kind(kind: str | None) -> None:
    """Raise `SettingError` unless this is a kind of quantization, or None."""
    if kind is not None and kind not in KINDS:
        raise SettingError(f"quantize must be one of {', '.join(KINDS)}, or None, not {kind!r}")


def stored_kind(kind: str) -> str:
    """Return how the weights of that kind of quantization are stored: "int8" or "int4"."""
    return ROUNDING_KINDS.get(kind, kind)


def quantization_of(params: Params) -> str | None:
    """Return the kind of quantization of the params: one of `KINDS`, or None."""
    for leaf in leaves(params):
        kind = kind_of(leaf) if isinstance(leaf, Quantized) else getattr(leaf, "kind", None)  # A packed weight has one.
        if kind in KINDS:
            return str(kind)
    return None


# --- quantizing, with NumPy -----------------------------------------------------------------------------------------


def quantize(params: Params, kind: str) -> Params:
    """Return params (NumPy arrays) with the token table and the weights of all linear layers quantized.

    `kind` is one of `KINDS`. Params that are quantized so already are returned unchanged.
    Raises `SettingError` for another kind, params quantized in the other kind, or a width that int4 cannot hold; and
    `NumericalError` for weights that are not finite.
    """
    check_kind(kind)
    if (found := quantization_of(params)) is not None:
        if stored_kind(found) != stored_kind(kind):
            raise SettingError(f"the params are {found} already and cannot become {kind}: take the float32 model")
        return params
    kind = stored_kind(kind)

    def linear(w: Array, b: Array) -> Params:
        return {"w": QuantizedWeight(*_quantized(np.asarray(w).T, kind)), "b": b}

    def block(ln_1: Params, attn: Params, ln_2: Params, mlp: Params) -> Params:
        layers = ({name: linear(**layer) for name, layer in part.items()} for part in (attn, mlp))
        return {"ln_1": ln_1, "attn": next(layers), "ln_2": ln_2, "mlp": next(layers)}

    return params | {
        "wte": QuantizedTable(*_quantized(np.asarray(params["wte"]), kind)),
        "blocks": [block(**each) for each in params["blocks"]],
    }


def _quantized(table: "np.ndarray[Any, Any]", kind: str) -> tuple[Any, Any]:
    """Quantize a table [n_rows, n_columns] of floats, in either memory order; return codes and scales."""
    encode = _int8 if kind == "int8" else _int4
    codes_shape, scale_shape = stored_shapes(kind, *table.shape)
    codes = np.empty(codes_shape, np.int8 if kind == "int8" else np.uint8)
    scale = np.empty(scale_shape, np.float32)
    step = max(1, _WEIGHTS_AT_A_TIME // table.shape[1])
    for begin in range(0, len(table), step):
        rows = slice(begin, begin + step)
        # Only a few rows at a time are copied to contiguous float32, not the whole model.
        weights = np.ascontiguousarray(table[rows], dtype=np.float32)
        if not np.isfinite(weights).all():
            raise NumericalError("the weights are not finite, or too large for float32, and cannot be quantized")
        codes[rows], scale[rows] = encode(weights)
    return codes, scale


def _int8(weights: "np.ndarray[Any, Any]") -> tuple[Any, Any]:
    largest = np.maximum(weights.max(axis=1), -weights.min(axis=1))
    scale = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny)  # A row of zeros is not divided by 0.
    return np.rint(weights / scale[:, None]).astype(np.int8), scale


def _int4(weights: "np.ndarray[Any, Any]") -> tuple[Any, Any]:
    groups = weights.reshape(len(weights), -1, GROUP)
    # The number of largest magnitude in a group becomes code -8, so that 16 codes are in use, not 15.
    low, high = groups.min(axis=2), groups.max(axis=2)
    scale = np.where(high > -low, high, low) / np.float32(-8)
    scale = np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.finfo(np.float32).tiny, scale)
    codes = np.clip(np.rint(groups / scale[:, :, None]), -8, 7).astype(np.int8).view(np.uint8) + np.uint8(8)
    packed = codes[:, :, : GROUP // 2] | (codes[:, :, GROUP // 2 :] << np.uint8(4))
    return packed.reshape(len(weights), -1), scale


# --- using them, with any array library -----------------------------------------------------------------------------


def dequantize(weight: Quantized, dtype: Any, xp: Namespace) -> Array:
    """Return the stored table [n_rows, n_columns] of a quantized weight, in a floating-point dtype of `xp`."""
    scale = xp.astype(weight.scale, dtype)
    if kind_of(weight) == "int8":
        return xp.astype(weight.q, dtype) * scale[:, None]
    groups = xp.reshape(weight.q, (*weight.scale.shape, GROUP // 2))  # [n_rows, n_groups, 16]
    codes = xp.concat([groups % 16, groups // 16], axis=-1)  # [n_rows, n_groups, 32]
    return xp.reshape((xp.astype(codes, dtype) - 8) * scale[:, :, None], rows_and_columns(weight))


def quantized_backend(backend: "Backend", kind: str = "int8") -> "Backend":
    """Return the same backend with a namespace that takes weights of that kind, or the backend itself if it has one.

    Raises `BackendError` if the backend needs a library for it that is not installed, or does not round activations.
    """
    if kind in ROUNDING_KINDS:
        backend = backend.rounding_activations()
    return backend if backend.takes_quantized else backend.quantized()


class QuantizedNamespace:
    """An array library's namespace in which three functions take quantized weights as well as arrays.

    `dtype` is the dtype of rows taken from a quantized table. `product(x, weight)` returns
    [rows, n_in] @ [n_in, n_out] -> [rows, n_out]; by default it dequantizes the weight first.
    """

    def __init__(self, xp: Namespace, dtype: str, product: Product | None = None) -> None:
        self._xp = xp
        self._product = product or self._product_with_dequantized
        self._dtype = getattr(xp, dtype)
        self._plain = xp.matmul, xp.take, xp.matrix_transpose
        self._key = id(xp), dtype, product

    def __eq__(self, other: object) -> bool:
        """Return whether both compute the same. A compiler then shares its programs between them."""
        return isinstance(other, QuantizedNamespace) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        setattr(self, name, value)  # Later look-ups find the attribute without `__getattr__`.
        return value

    def matmul(self, x: Array, w: Array | QuantizedWeight) -> Array:
        """Return the product of two arrays, or of an array [rows, n_in] with a quantized weight."""
        return self._product(x, w) if isinstance(w, QuantizedWeight) else self._plain[0](x, w)

    def take(self, x: Array | QuantizedTable, indices: Array, *, axis: int) -> Array:
        """Return rows of an array, or of a quantized table."""
        take = self._plain[1]
        if not isinstance(x, QuantizedTable):
            return take(x, indices, axis=axis)
        rows = QuantizedTable(take(x.q, indices, axis=axis), take(x.scale, indices, axis=axis))
        return dequantize(rows, self._dtype, self._xp)

    def matrix_transpose(self, x: Array | QuantizedTable) -> Array | QuantizedWeight:
        """Return the transposed array; for a quantized table, a quantized weight with the same numbers."""
        return QuantizedWeight(*x) if isinstance(x, QuantizedTable) else self._plain[2](x)

    def _product_with_dequantized(self, x: Array, w: QuantizedWeight) -> Array:
        matmul, _, transpose = self._plain
        if kind_of(w) == "int8" and x.dtype in (self._xp.float32, self._xp.float64):
            # The scales are applied to the product, so that compilers convert codes while they multiply. Half precision
            # could overflow before the scales are applied.
            return matmul(x, transpose(self._xp.astype(w.q, x.dtype))) * self._xp.astype(w.scale, x.dtype)
        return matmul(x, transpose(dequantize(w, x.dtype, self._xp)))
