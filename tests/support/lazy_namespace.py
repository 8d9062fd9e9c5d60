"""A lazy array library on array-api-strict: an array is a graph, and NumPy sees its numbers when it asks for them.

Two things go wrong at that moment alone: a graph that has grown too large, and functions named in `LAZY_FAILS`.
"""

import os
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np

LARGEST = 3000  # nodes; a step of the bundled model has some hundreds
__version__ = "1.0"


class Lazy:
    """A node of the graph. Its value is known from the beginning, and handed out by `__array__` alone."""

    def __init__(self, value: Any, inputs: tuple["Lazy", ...] = (), made_by: str = "") -> None:
        self.value, self.inputs, self.made_by = value, inputs, made_by
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        import lazy_namespace

        return lazy_namespace

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        nodes: dict[int, Lazy] = {}
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if id(node) not in nodes:
                nodes[id(node)] = node
                waiting += node.inputs
        if len(nodes) > LARGEST:
            raise RuntimeError(f"a graph of {len(nodes)} nodes is left to compute")
        if any(node.made_by == os.environ.get("LAZY_FAILS", "-") for node in nodes.values()):
            raise RuntimeError("this kernel does not exist")
        return np.array(np.from_dlpack(self.value), dtype=dtype)

    def __getitem__(self, index: Any) -> "Lazy":
        return Lazy(self.value[index], (self,), "getitem")

    def __setitem__(self, index: Any, new: "Lazy") -> None:
        before = Lazy(self.value, self.inputs, self.made_by)
        self.value = array_api_strict.asarray(self.value, copy=True)
        self.value[index] = new.value
        self.inputs, self.made_by = (before, new), "setitem"

    def __invert__(self) -> "Lazy":
        return Lazy(~self.value, (self,), "invert")


def _operator(name: str) -> Callable[[Lazy, Any], Any]:
    def operator(self: Lazy, other: Any) -> Any:
        value = getattr(self.value, name)(other.value if isinstance(other, Lazy) else other)
        inputs = (self, other) if isinstance(other, Lazy) else (self,)
        return value if value is NotImplemented else Lazy(value, inputs, name)

    return operator


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "mod",
    "and",
    "or",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
]:
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))


def __getattr__(name: str) -> Any:
    found = getattr(array_api_strict, name)
    if not callable(found) or name == "finfo":
        return found

    def function(*args: Any, **kwargs: Any) -> Lazy:
        inputs: list[Lazy] = []

        def given(value: Any) -> Any:
            if isinstance(value, list):
                return [given(each) for each in value]
            if isinstance(value, Lazy):
                inputs.append(value)
                return value.value
            return value

        return Lazy(found(*map(given, args), **kwargs), tuple(inputs), name)

    return function
