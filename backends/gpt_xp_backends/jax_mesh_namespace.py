"""Weights that are split over the devices of a mesh, and a namespace of JAX that takes them.

`transformer.py` uses such weights as if they were arrays: `c_attn` split by heads, and a token table split by tokens.
"""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_xp.types import Array, Namespace


class Heads(NamedTuple):
    """The weight [n_embd, 3, n_head, d_head] or the bias [3, n_head, d_head] of `c_attn`."""

    array: Any


@jax.tree_util.register_pytree_node_class
class Table:
    """The token table, padded to [n_rows, n_embd], of which the first `n_vocab` rows count."""

    def __init__(self, array: Any, n_vocab: int) -> None:
        self.array, self.n_vocab = array, n_vocab

    def tree_flatten(self) -> tuple[tuple[Any], int]:
        """Return the array, and what JAX compiles as a constant."""
        return (self.array,), self.n_vocab

    @classmethod
    def tree_unflatten(cls, n_vocab: int, arrays: tuple[Any]) -> "Table":
        """Return a table with this array."""
        return cls(arrays[0], n_vocab)


class _TransposedTable(NamedTuple):
    table: Table


class _Qkv:
    """Queries, keys and values [rows, 3, n_head, d_head], between `linear` and the `reshape` that follows in `mha`."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    def __add__(self, bias: Heads) -> "_Qkv":
        return _Qkv(self.rows + bias.array)


def placement(mesh: Mesh, *spec: str | None) -> NamedSharding:
    """Return how an array is placed whose axes are split over these axes of the mesh (None: not split)."""
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]


def flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight of `c_attn` in the checkpoint."""
    return (*shape[:-3], math.prod(shape[-3:]))


@functools.cache  # JAX would compile again for another namespace object.
def mesh_namespace(mesh: Mesh) -> Namespace:
    """Return jax.numpy with four functions that take the weights above as well as arrays."""

    def constrain(x: Array, *spec: str | None) -> Array:
        return jax.lax.with_sharding_constraint(x, placement(mesh, *spec))  # type: ignore[no-untyped-call]

    def matmul(a: Array, b: Any) -> Any:
        if isinstance(b, Heads):
            return _Qkv(jnp.einsum("re,eahd->rahd", a, b.array))
        if not isinstance(b, _TransposedTable):
            return jnp.matmul(a, b)
        rows = "data" if a.shape[0] % mesh.shape["data"] == 0 else None
        logits = constrain(jnp.matmul(a, b.table.array.T), rows, "model")
        return constrain(logits, rows, None)[:, : b.table.n_vocab]  # Here the logits of all devices are collected.

    def reshape(x: Any, shape: tuple[int, ...]) -> Array:
        if isinstance(x, _Qkv):  # to [batch, n_seq, 3, n_head, d_head], with the heads that pad
            return jnp.reshape(x.rows, (-1, shape[1], *x.rows.shape[1:]))
        if x.ndim == 4 and len(shape) == 2 and math.prod(x.shape[:2]) == shape[0]:  # to [rows, heads that pad, too]
            return jnp.reshape(x, (shape[0], -1))
        return jnp.reshape(x, shape)

    def take(x: Any, indices: Array, *, axis: int) -> Array:
        return jnp.take(x.array if isinstance(x, Table) else x, indices, axis=axis)

    def matrix_transpose(x: Any) -> Any:
        return _TransposedTable(x) if isinstance(x, Table) else jnp.matrix_transpose(x)

    namespace = ModuleType("jax.numpy on a mesh")
    changed = {"matmul": matmul, "reshape": reshape, "take": take, "matrix_transpose": matrix_transpose}
    vars(namespace).update(vars(jnp) | changed)
    return namespace
