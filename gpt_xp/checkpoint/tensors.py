"""Name the tensors of a GPT-2, give their shapes, and build the tree of params from them.

The names are those of OpenAI's variables (openai/gpt-2 `src/model.py`) as transformers' `GPT2LMHeadModel` spells them:
`h.0.attn.c_attn.weight`. Its weights are [in, out] like OpenAI's own, so nothing is transposed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError, ConfigError
from gpt_xp.quantization import Quantized, QuantizedTable, QuantizedWeight, quantization_of, stored_shapes
from gpt_xp.tree import tree_map
from gpt_xp.types import NumpyArray, Params

DTYPES = ("float16", "float32", "float64")  # Params can be read and saved in these.
# The names that safetensors and NumPy have for the dtype of quantized codes.
QUANTIZED_DTYPES: dict[str | None, tuple[str, ...]] = {None: (), "int8": ("I8", "int8"), "int4": ("U8", "uint8")}
PREFIX = "transformer."  # Names in a model with a head begin with it. The published files lack it.
MAX_NAMES_SHOWN = 6  # names in one message
_SCALE_SUFFIX = "_scale"  # A quantized tensor has codes and scales. The name of its scales ends so.


def build_params(
    config: GPT2Config, leaf: Callable[[str, tuple[int, ...]], Any], quantization: str | None = None
) -> Params:
    """Return the tree of params with `leaf(name, shape)` in each place.

    This is the one list of names, for reading and writing.
    """
    n_embd = config.n_embd

    def quantized(name: str, rows: int, columns: int) -> tuple[Any, Any]:
        q, scale = stored_shapes(str(quantization), rows, columns)
        return leaf(name, q), leaf(f"{name}{_SCALE_SUFFIX}", scale)

    def table(name: str, rows: int, columns: int) -> Any:
        return QuantizedTable(*quantized(name, rows, columns)) if quantization else leaf(name, (rows, columns))

    def weight(name: str, n_in: int, n_out: int) -> Any:
        return QuantizedWeight(*quantized(name, n_out, n_in)) if quantization else leaf(name, (n_in, n_out))

    def norm(name: str) -> Params:
        return {"g": leaf(f"{name}.weight", (n_embd,)), "b": leaf(f"{name}.bias", (n_embd,))}

    def linear(name: str, n_in: int, n_out: int) -> Params:
        return {"w": weight(f"{name}.weight", n_in, n_out), "b": leaf(f"{name}.bias", (n_out,))}

    def block(name: str) -> Params:
        return {
            "ln_1": norm(f"{name}.ln_1"),
            "attn": {
                "c_attn": linear(f"{name}.attn.c_attn", n_embd, 3 * n_embd),
                "c_proj": linear(f"{name}.attn.c_proj", n_embd, n_embd),
            },
            "ln_2": norm(f"{name}.ln_2"),
            "mlp": {
                "c_fc": linear(f"{name}.mlp.c_fc", n_embd, 4 * n_embd),
                "c_proj": linear(f"{name}.mlp.c_proj", 4 * n_embd, n_embd),
            },
        }

    return {
        "wte": table("wte.weight", config.n_vocab, n_embd),
        "wpe": leaf("wpe.weight", (config.n_ctx, n_embd)),
        "blocks": [block(f"h.{i}") for i in range(config.n_layer)],
        "ln_f": norm("ln_f"),
    }


def tensor_shapes(config: GPT2Config, n_tensors: int, quantization: str | None = None) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors of a GPT-2, without prefix, and their shapes.

    `n_tensors` is the number of tensors found. Raises `CheckpointError` where the config has more layers than that.
    """
    # A config may claim any number of layers. This comes before a list of that length is made.
    if config.n_layer > n_tensors:
        raise CheckpointError(
            f"the config has {config.n_layer} layers, but there are only {n_tensors} tensors; "
            f"take weights and config of one GPT-2"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    build_params(config, shapes.__setitem__, quantization)
    return shapes


def check_params(params: Params, config: GPT2Config) -> None:
    """Raise `ConfigError` unless `params` is a tree of arrays, quantized or not, of the shapes that `config` has."""
    tree = tree_map(lambda leaf: leaf, params)  # This turns tuples into lists.
    quantization = quantization_of(tree)
    names = build_params(config, lambda name, shape: (name, shape), quantization)
    wanted = {path: list(shape) for path, (_, shape) in _leaves(names)}
    found = {path: list(getattr(leaf, "shape", ())) for path, leaf in _leaves(tree) if path}
    for path in (*wanted, *found):
        if found.get(path) != wanted.get(path):
            raise ConfigError(
                f"params must be a tree of arrays like gpt_xp.load(...).params, in the shapes of the config: "
                f"{path} must be {wanted.get(path, 'left out')}, not {found.get(path, 'missing')}"
            )


def check_tensors(
    what: str,
    found: dict[str, tuple[tuple[int, ...], str]],
    expected: dict[str, tuple[int, ...]],
    dtypes: Iterable[str],
    code_dtypes: Iterable[str] = (),
) -> None:
    """Raise `CheckpointError` where tensors are missing, unknown, or of another shape or dtype. It names them.

    The message begins with `what`. `found` maps names to shape and dtype, and `expected` maps names to shapes.
    Tensors that have a scale must have one of `code_dtypes`, and all others one of `dtypes`.
    """
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, (shape, dtype) in found.items():
        if name not in expected:
            faults.append(f"{name!r:.80} is no tensor of this GPT-2")
        elif shape != expected[name]:
            faults.append(f"{name} is {list(shape)!s:.80} instead of {list(expected[name])}")
        elif dtype not in (allowed := code_dtypes if f"{name}{_SCALE_SUFFIX}" in expected else dtypes):
            faults.append(f"{name} is {dtype} instead of one of {', '.join(allowed)}")
    if faults:
        shown = "; ".join(faults[:MAX_NAMES_SHOWN])
        more = f"; and {len(faults) - MAX_NAMES_SHOWN} more" if len(faults) > MAX_NAMES_SHOWN else ""
        raise CheckpointError(f"{what} do not fit the config: {shown}{more}. Take weights and config of one GPT-2")


def named_arrays(params: Params, config: GPT2Config) -> dict[str, NumpyArray]:
    """Return the arrays of params, contiguous, by the names that transformers gives them.

    Raises `CheckpointError` where they do not fit the config.
    """
    quantization = quantization_of(params)
    found = {path: np.asarray(leaf) for path, leaf in _leaves(params)}
    tensor_shapes(config, len(found), quantization)  # This refuses too many layers.
    wanted = dict(_leaves(build_params(config, lambda name, shape: (name, shape), quantization)))
    check_tensors(
        "the params",
        {path: (array.shape, str(array.dtype)) for path, array in found.items()},
        {path: shape for path, (_, shape) in wanted.items()},
        DTYPES,
        QUANTIZED_DTYPES[quantization],
    )
    # The bytes of an array are written in memory order. A transposed array must be copied first, or it would be wrong.
    return {f"{PREFIX}{name}": np.ascontiguousarray(found[path]) for path, (name, _) in wanted.items()}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of dicts and lists, with their paths: "blocks.0.ln_1.g"."""
    if isinstance(tree, Quantized):
        yield path, tree.q
        yield f"{path}{_SCALE_SUFFIX}", tree.scale
        return
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(branch, f"{path}.{key}" if path else str(key))
