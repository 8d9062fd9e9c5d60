"""Weights in panels, as the kernels of `products` read them."""

import itertools
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt_xp.errors import BackendError
from gpt_xp.quantization import GROUP, ROUNDING_KINDS, QuantizedWeight, kind_of
from gpt_xp.types import Namespace, NumpyArray, Params
from gpt_xp_backends.native_backend import dots

PANELS = 64  # So many panels are packed before the memory of what they were packed from is given back.


class PackedWeight:
    """The weight of a linear layer, [n_in, n_out], in panels of some columns.

    `panels` is [n_panels, n_in, columns] of float32, float16 or int8. For int4 it is [n_panels, n_in / 2, columns] of
    uint8: a byte has the codes of inputs i and i + 16 of a group of 32. For w8a8 it is [n_panels, 1 + n_in / 4,
    columns] of int32: -128 times the sum of a column, then the codes of four inputs in each. For w4a8 it is [n_panels,
    n_in / 8, columns] of int32, with four neighbouring bytes of int4 in each. `scales` is [n_panels * columns] for int8
    and w8a8, and [n_panels, groups, columns] for int4. Columns after the last are zero.
    """

    __slots__ = ("kind", "panels", "scales", "shape")

    def __init__(self, kind: str, shape: tuple[int, int], panels: NumpyArray, scales: NumpyArray | None) -> None:
        self.kind, self.shape, self.panels, self.scales = kind, shape, panels, scales

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of the numbers in memory."""
        stored = {"w8a8": np.int8, "w4a8": np.uint8}.get(self.kind, self.panels.dtype)
        return np.dtype(stored)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def product(self, x: NumpyArray) -> NumpyArray:
        """Return x [rows, n_in] times a weight of floats, computed by NumPy."""
        panels = (
            self.panels[i : i + PANELS].astype(np.float32, copy=False) for i in range(0, len(self.panels), PANELS)
        )
        out = np.concatenate([np.matmul(x, each) for each in panels])  # [n_panels, rows, columns]
        return out.transpose(1, 0, 2).reshape(len(x), -1)[:, : self.shape[1]]

    def columns(self, ids: NumpyArray) -> NumpyArray:
        """Return some columns in float32, [*ids.shape, n_in]."""
        (n_in, n_out), width = self.shape, self.panels.shape[2]
        if ids.size and not 0 <= ids.min() <= ids.max() < n_out:
            raise IndexError(f"there are {n_out} columns, and {ids.min()} to {ids.max()} were asked for")
        panel, column = np.divmod(ids, width)
        codes = self.panels[panel, :, column]
        if self.kind == "w8a8":
            codes = np.ascontiguousarray(codes[..., 1:]).view(np.int8)[..., :n_in]
        if self.kind == "w4a8":
            codes = np.ascontiguousarray(codes).view(np.uint8)
        if self.kind in ("int8", "w8a8"):
            assert self.scales is not None
            return np.multiply(codes, self.scales[ids][..., None], dtype=np.float32)
        if self.kind in ("int4", "w4a8"):
            assert self.scales is not None
            pairs = codes.reshape(*ids.shape, -1, GROUP // 2)
            groups = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(np.float32) - 8
            return (groups * self.scales[panel, :, column][..., None]).reshape(*ids.shape, n_in)
        return codes.astype(np.float32)


class PackedTable:
    """The token table, [n_rows, n_columns], packed as the weight of `unembed`.

    `namespace` takes packed weights. Functions that are given no namespace find it here.
    """

    __slots__ = ("namespace", "weight")

    def __init__(self, weight: PackedWeight, namespace: Namespace) -> None:
        self.weight, self.namespace = weight, namespace

    @property
    def kind(self) -> str:
        """The kind of the weight."""
        return self.weight.kind

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of the numbers in memory."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the table."""
        return self.weight.shape[1], self.weight.shape[0]


ROUNDING = {stored: kind for kind, stored in ROUNDING_KINDS.items()}  # {"int8": "w8a8", "int4": "w4a8"}


def pack(weight: Any, dtype: str, columns: int, n_threads: int, rounds: bool = False) -> PackedWeight:
    """Pack a weight [n_in, n_out], an array or quantized, in panels of that many columns.

    An array becomes `dtype`. A quantized weight stays what it is, or becomes the kind of `ROUNDING` if it `rounds`.
    Raises `BackendError` for a number that is too large for float16.
    """
    if isinstance(weight, QuantizedWeight):
        (n_in, n_out), stored = weight.shape, kind_of(weight)
        kind = ROUNDING[stored] if rounds else stored
        if kind == "w8a8":
            panels = _codes_by_four(weight.q, columns, n_threads)
        elif kind == "w4a8":
            four = np.ascontiguousarray(weight.q).view(np.int32)
            panels = _panels(four.T, np.dtype(np.int32), columns, n_threads)
        elif kind == "int8":
            panels = _panels(weight.q.T, np.dtype(np.int8), columns, n_threads)
        else:
            panels = _panels(weight.q.T, np.dtype(np.uint8), columns, n_threads)
        if stored == "int8":
            scales = np.zeros(len(panels) * columns, np.float32)
            scales[:n_out] = weight.scale
        else:
            # A code of 8 is the number 0, and the scale of the columns after the last is 0.
            scales = _panels(weight.scale.T, np.dtype(np.float32), columns, n_threads)
        return PackedWeight(kind, (n_in, n_out), panels, scales)
    n_in, n_out = weight.shape
    try:
        panels = _panels(weight, np.dtype(dtype), columns, n_threads)
    except FloatingPointError:
        raise BackendError(f"a weight is too large for {dtype}: take float32") from None
    return PackedWeight(dtype, (n_in, n_out), panels, None)


def _panels(weight: Any, dtype: "np.dtype[Any]", columns: int, n_threads: int) -> NumpyArray:
    rows, n_out = weight.shape
    n_panels = -(-n_out // columns)
    panels = np.empty((n_panels, rows, columns), dtype)
    if n_out % columns:
        panels[-1] = 0

    def copy(begin: int, end: int) -> None:
        with np.errstate(over="raise"):  # A number that float16 cannot hold.
            for panel in range(begin, end):
                part = weight[:, panel * columns : (panel + 1) * columns]
                panels[panel, :, : part.shape[1]] = part

    for begin in range(0, n_panels, PANELS):
        share(copy, begin, min(begin + PANELS, n_panels), n_threads)
        release_pages(weight[:, begin * columns : (begin + PANELS) * columns])
    release_pages(weight)
    return panels


def _codes_by_four(codes: NumpyArray, columns: int, n_threads: int) -> NumpyArray:
    """Return panels of w8a8 for codes [n_out, n_in]."""
    n_out, n_in = codes.shape
    by_four = np.zeros((n_out, 1 + -(-n_in // dots.TOGETHER)), np.int32)
    by_four[:, 1:].view(np.int8)[:, :n_in] = codes
    by_four[:, 0] = -dots.ZERO * codes.sum(axis=1, dtype=np.int32)
    return _panels(by_four.T, np.dtype(np.int32), columns, n_threads)


def is_float(params: Params) -> bool:
    """Return whether packed params are float, and not quantized."""
    table = params["wte"]
    return not isinstance(table, PackedTable) or table.weight.scales is None


def release_pages(array: NumpyArray) -> None:
    """Let the system take back the memory of the file that an array is mapped from. Reading it maps it again."""
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    lies_side_by_side = array.flags.c_contiguous or array.flags.f_contiguous
    if not isinstance(owner, mmap.mmap) or not lies_side_by_side or not hasattr(owner, "madvise"):
        return
    first = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    begin, end = -(-first // mmap.PAGESIZE), (first + array.nbytes) // mmap.PAGESIZE
    if begin < end:  # Whole pages alone.
        owner.madvise(mmap.MADV_DONTNEED, begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE)


def share(function: Callable[[int, int], None], first: int, last: int, n_threads: int) -> None:
    """Call `function(begin, end)` for parts of `range(first, last)` on several threads."""
    with ThreadPoolExecutor(n_threads) as pool:
        bounds = [first + (last - first) * i // n_threads for i in range(n_threads + 1)]
        for done in [pool.submit(function, *each) for each in itertools.pairwise(bounds)]:
            done.result()


def unpack(weight: PackedWeight) -> NumpyArray | QuantizedWeight:
    """Return the array, or the quantized weight, that was packed."""
    n_in, n_out = weight.shape
    whole = weight.panels.transpose(0, 2, 1).reshape(-1, weight.panels.shape[1])[:n_out]  # [n_out, rows]
    if weight.scales is None:
        return whole.T
    if weight.kind == "w4a8":
        whole = np.ascontiguousarray(whole).view(np.uint8)
    if weight.kind == "w8a8":
        whole = np.ascontiguousarray(whole[:, 1:]).view(np.int8)[:, :n_in]
    if weight.kind in ("int8", "w8a8"):
        return QuantizedWeight(whole, weight.scales[:n_out])
    return QuantizedWeight(whole, weight.scales.transpose(0, 2, 1).reshape(-1, n_in // GROUP)[:n_out])
