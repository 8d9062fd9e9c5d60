"""CUDA kernels, one kind a module, and what they ask of an array."""

from typing import Any

# dtype -> the type of the numbers, and that of their sums
TYPES = {"float16": ("__half", "float"), "float32": ("float", "float"), "float64": ("double", "double")}
WIDTH = 16  # bytes that a thread reads at once


def address(x: Any) -> int:
    """Return where an array begins on the device."""
    return int(x.data.ptr)


def is_aligned(x: Any) -> bool:
    """Return whether all rows of an array, its last axis, can be read 16 bytes at once."""
    *others, last = x.strides
    is_whole = last == x.itemsize and x.shape[-1] * x.itemsize % WIDTH == 0
    return is_whole and address(x) % WIDTH == 0 and all(stride % WIDTH == 0 for stride in others)


def strides(x: Any) -> list[int]:
    """Return the strides along the last four axes in numbers: 0 where an axis has one number, or is not there."""
    found = [0 if size == 1 else stride // x.itemsize for size, stride in zip(x.shape, x.strides, strict=True)]
    return [0] * (4 - x.ndim) + found
