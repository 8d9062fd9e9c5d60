"""Describes a mesh of devices: its shape, how GPT-2's weights are split over it, and the processes that share it.

A mesh has two axes. The axis `data` splits the rows of a batch, and every device of it holds all weights. The axis
`model` splits the weights: attention by heads, the feed-forward network by its width, the token table by tokens. Only
JAX computes on a mesh (`gpt_xp_backends.jax_mesh`). This module computes with sizes alone.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from gpt_xp.config import GPT2Config
from gpt_xp.errors import SettingError
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.tree import leaves

MESH_FORMS = "data=N, model=N, data=N,model=N, or auto"


@dataclass(frozen=True)
class MeshShape:
    """The number of devices along each axis of a mesh. `data` is None for "auto": as many as there are devices."""

    data: int | None = 1
    model: int = 1

    def fitted_to(self, n_devices: int) -> "MeshShape":
        """Return the shape with `data` known. Raises `SettingError` if there are fewer devices than it needs."""
        shape = self if self.data else replace(self, data=n_devices)
        if shape.n_devices > n_devices:
            are = "is 1" if n_devices == 1 else f"are {n_devices}"
            raise SettingError(f"the mesh {shape} needs {shape.n_devices} devices, and there {are}: take a smaller one")
        return shape

    @property
    def n_devices(self) -> int:
        """The number of devices of the mesh."""
        assert self.data is not None
        return self.data * self.model

    def __str__(self) -> str:
        sizes = [f"{name}={n}" for name, n in (("data", self.data), ("model", self.model)) if n != 1]
        return ",".join(sizes or ["data=1"]) if self.data else "auto"


def parse_mesh(text: str) -> MeshShape:
    """Return the shape that a text such as "data=2,model=4" gives. Raises `SettingError` for another text."""
    if text == "auto":
        return MeshShape(data=None)
    sizes: dict[str, int] = {}
    for part in text.split(",") if isinstance(text, str) else [repr(text)]:
        name, _, number = part.strip().partition("=")
        if name not in ("data", "model") or name in sizes or not re.fullmatch(r"[1-9]\d{0,5}", number, re.ASCII):
            raise SettingError(f"mesh must be {MESH_FORMS}, with whole numbers of at least 1, not {text!r:.80}")
        sizes[name] = int(number)
    return MeshShape(**sizes)


@dataclass(frozen=True)
class Hosts:
    """The processes that share a mesh: where process 0 listens ("10.0.0.5:7000"), how many, and which one this is."""

    address: str
    count: int
    index: int


def parse_hosts(text: str) -> Hosts:
    """Return the processes that a text such as "10.0.0.5:7000,2,0" gives. Raises `SettingError` for another text."""
    address, *numbers = text.split(",") if isinstance(text, str) else [""]
    host, _, port = address.rpartition(":")
    whole = [int(each) for each in (port, *numbers) if each.isdecimal() and each.isascii()]
    if not host or len(numbers) != 2 or len(whole) != 3 or not 0 < whole[0] < 2**16 or whole[2] >= whole[1]:
        raise SettingError(
            f"hosts must be ADDRESS:PORT,COUNT,INDEX of process 0, their number, and this one's (from 0), such as "
            f"10.0.0.5:7000,2,0, not {text!r:.80}"
        )
    return Hosts(address, whole[1], whole[2])


# Variables in which Slurm and Open MPI tell a process how many there are, and which one it is.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def launched_processes() -> tuple[int, int]:
    """Return how many processes Slurm, Open MPI or a TPU pod has started for this job, and which one this is."""
    for count, index in LAUNCHERS.items():
        numbers = [os.environ.get(name, "") for name in (count, index)]
        if all(map(str.isdecimal, numbers)):
            return int(numbers[0]), int(numbers[1])
    names, number = os.environ.get("TPU_WORKER_HOSTNAMES", ""), os.environ.get("TPU_WORKER_ID", "")
    return len(names.split(",")), int(number) if number.isdecimal() else 0


# --- how weights are split --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How one weight is stored on a mesh.

    It is reshaped to `shape`. The axis `axis` (None: no axis) is padded with zeros to a multiple of `multiple` times
    the devices of the axis `model`, and split over them.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    multiple: int = 1

    def padded(self, n_model: int) -> tuple[int, ...]:
        """Return the shape after padding for `n_model` devices."""
        if self.axis is None:
            return self.shape
        unit = self.multiple * n_model
        longer = -(-self.shape[self.axis] // unit) * unit
        return (*self.shape[: self.axis], longer, *self.shape[self.axis + 1 :])


def splits(config: GPT2Config) -> dict[str, Any]:
    """Return a tree like the params, with a `Split` in place of each weight.

    `c_attn` is split by heads, so that a block needs two sums over the devices: after `attn` and after `mlp`. Heads of
    zeros add nothing: the rows of `c_proj` that read them are zeros too.
    """
    n_embd, n_head, width = config.n_embd, config.n_head, 4 * config.n_embd
    d_head = n_embd // n_head
    whole = {"g": Split((n_embd,)), "b": Split((n_embd,))}
    block = {
        "ln_1": whole,
        "attn": {
            "c_attn": {"w": Split((n_embd, 3, n_head, d_head), 2), "b": Split((3, n_head, d_head), 1)},
            "c_proj": {"w": Split((n_embd, n_embd), 0, multiple=d_head), "b": Split((n_embd,))},
        },
        "ln_2": whole,
        "mlp": {
            "c_fc": {"w": Split((n_embd, width), 1), "b": Split((width,), 0)},
            "c_proj": {"w": Split((width, n_embd), 0), "b": Split((n_embd,))},
        },
    }
    return {
        "wte": Split((config.n_vocab, n_embd), 0),
        "wpe": Split((config.n_ctx, n_embd)),
        "blocks": [block] * config.n_layer,
        "ln_f": whole,
    }


def padded_heads(config: GPT2Config, n_model: int) -> int:
    """Return the number of heads after padding for `n_model` devices."""
    return -(-config.n_head // n_model) * n_model


def params_bytes_on_device(config: GPT2Config, shape: MeshShape, dtype: str) -> int:
    """Return the bytes of the params on each device of a mesh."""
    total = 0
    for each in leaves(splits(config)):
        total += math.prod(each.padded(shape.model)) // (1 if each.axis is None else shape.model)
    return total * ITEM_SIZE[dtype]


def cache_bytes_on_device(config: GPT2Config, shape: MeshShape, dtype: str) -> int:
    """Return the bytes of the cache of one row at full context on each device that computes the row."""
    heads = padded_heads(config, shape.model) // shape.model
    return 2 * config.n_layer * config.n_ctx * heads * (config.n_embd // config.n_head) * ITEM_SIZE[dtype]
