"""Directories on disk <-> params and config, in the layout that `transformers` writes and the Hub serves.

A directory holds `config.json` and `model.safetensors`, or shards of it listed in `model.safetensors.index.json`.
The tensors have the names of OpenAI's variables (openai/gpt-2 `src/model.py`) as transformers' `GPT2LMHeadModel`
spells them: `transformer.h.0.attn.c_attn.weight`, [in, out] like OpenAI's own, so that nothing is transposed.
"""

import errno
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt_xp.checkpoint.carried import CONFIG, GENERATION_CONFIG, Carried
from gpt_xp.checkpoint.config_json import check_roles, config_entries, config_from, quantization_from
from gpt_xp.checkpoint.safetensors_file import (
    FLOATS,
    NumpyArray,
    SafetensorsFile,
    open_regular,
    open_safetensors,
    parse_json,
    write_safetensors,
)
from gpt_xp.config import GPT2Config
from gpt_xp.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    GptXpWarning,
    ModelNotFoundError,
)
from gpt_xp.quantization import Quantized, QuantizedTable, QuantizedWeight, quantization_of, stored_shapes
from gpt_xp.reporting.text import size
from gpt_xp.tree import tree_map
from gpt_xp.types import Params

WEIGHTS = "model.safetensors"
SAVING = ".saving-"  # begins the name of the folder in which a checkpoint is written aside
_DTYPES = ("float16", "float32", "float64")
_SCALE = "_scale"  # ends the name of the scales that belong to the codes of a quantized tensor
_CODES = {"int8": ("I8", "int8"), "int4": ("U8", "uint8")}  # how safetensors and NumPy call the dtype of codes

# Constants that old versions of transformers saved with the weights: the causal mask and what it fills in.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_PREFIX = "transformer."  # of the names in a model with a head; the published files lack it
_TABLE, _HEAD = "wte.weight", "lm_head.weight"  # GPT-2 has one matrix for both, and a file has one of the names or two
_PARTS = ("wte", "wpe", "h", "ln_f", "lm_head")  # other names outside the transformer are those of additional heads
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")  # a plain name: no index may lead out of its directory
_MAX_JSON_BYTES = 10_000_000  # of a config or an index; real ones have some thousand
_MAX_FAULTS = 6  # shown in one message
_PIECE = 2**16  # bytes that are compared at a time
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


_Tensors = dict[str, tuple[SafetensorsFile, str]]  # name: (file, name in the file)


class SavesItself(Protocol):
    """A tokenizer, as far as `save_checkpoint` knows it."""

    def check_place(self, directory: str | os.PathLike[str]) -> object:
        """Raise `CheckpointError` where files in `directory` would be read in place of those that `save` writes."""

    def save(self, directory: str) -> object:
        """Write the tokenizer's files into an existing directory."""


def read_config(directory: str | os.PathLike[str]) -> GPT2Config:
    """The config in a directory's `config.json`, refused unless it describes GPT-2's mathematics.

    An entry that is absent has transformers' default. The tokens that end and begin a text are those that
    `generation_config.json` names, else `config.json`; an id outside the vocabulary, which no model can choose, is left
    out. Raises `ModelNotFoundError` where there is no such directory, `CheckpointError` where a file is missing,
    unreadable or malformed, and `ConfigError` for another model.
    """
    return config_of(read_carried(directory))


def config_of(carried: Carried) -> GPT2Config:
    """The config that the entries of a checkpoint describe. Raises `ConfigError` for another model."""
    with _naming(carried.directory / GENERATION_CONFIG):
        check_roles(carried.generation)
    with _naming(carried.directory / CONFIG):
        return config_from(carried.config, carried.generation)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let a `ConfigError` name the file that has the entries."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_carried(directory: str | os.PathLike[str]) -> Carried:
    """All entries of a directory's `config.json` and `generation_config.json`.

    Raises `ModelNotFoundError` where there is no such directory, and `CheckpointError` where a file is missing,
    unreadable or malformed.
    """
    path, generation = os.path.join(directory, CONFIG), os.path.join(directory, GENERATION_CONFIG)
    with reading(directory):
        if not exists(path):
            if exists(os.path.join(directory, "adapter_config.json")):
                raise CheckpointError(
                    f"{directory} has an adapter (PEFT), and not the model that it belongs to: merge the two with "
                    f"merge_and_unload(), and save the result with save_pretrained"
                )
            raise CheckpointError(
                f"{directory} has no config.json: a checkpoint is a directory with config.json and {WEIGHTS}, "
                f"as transformers' save_pretrained writes it"
            )
        return Carried(Path(directory), read_json(path), read_json(generation) if exists(generation) else {})


def read_quantization(directory: str | os.PathLike[str]) -> str | None:
    """How the weights in a directory are quantized, by its `config.json`: "int8", "int4", or None.

    Raises what `read_config` raises, and `ConfigError` for a quantization that is not gpt-xp's.
    """
    path = os.path.join(directory, "config.json")
    with reading(directory):
        entries = read_json(path)
    with _naming(path):
        return quantization_from(entries)


def read_params(
    directory: str | os.PathLike[str],
    config: GPT2Config,
    dtype: str | None = "float32",
    quantization: str | None = None,
) -> Params:
    """The parameters in a directory, as a nested dict of read-only NumPy arrays.

    `dtype` is "float16", "float32", "float64", or None: each tensor as stored, bfloat16 as float32. With E = n_embd:

        {"wte": [n_vocab, E], "wpe": [n_ctx, E], "blocks": [block, ...], "ln_f": {"g": [E], "b": [E]}}

    and each of the n_layer blocks is

        {"ln_1": {"g": [E], "b": [E]}, "attn": {"c_attn": {"w": [E, 3E], "b": [3E]}, "c_proj": {"w": [E, E], "b": [E]}},
         "ln_2": {"g": [E], "b": [E]}, "mlp": {"c_fc": {"w": [E, 4E], "b": [4E]}, "c_proj": {"w": [4E, E], "b": [E]}}}

    With a `quantization` (see `read_quantization`), `wte` is a `QuantizedTable` and every `w` a `QuantizedWeight`, and
    all are as stored. An array is mapped from the file where that holds `dtype` at an aligned place, and read into
    aligned memory where not. A file that is mapped must not be written to; `save_checkpoint` replaces it, and the
    arrays stay as they were. Heads for other tasks (`score`, `v_head`) are left out, with a `GptXpWarning`.
    Raises `ModelNotFoundError` where there is no such directory, `CheckpointError` where the files are damaged,
    unreadable or do not fit `config`, `BackendError` for another dtype, `DeviceMemoryError` where memory runs out.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise BackendError(f"dtype {dtype!r} cannot be read; take one of {', '.join(_DTYPES)}")
    with reading(directory), ExitStack() as stack:
        files = _open_weights(directory, stack)
        tensors = _by_name(files)
        _check_prefix(directory, tensors)
        _unite_tied(directory, tensors)
        expected = tensor_shapes(config, len(tensors), quantization)
        others = _other_heads(tensors) if tensors.keys() > expected.keys() else []
        for name in others:
            del tensors[name]
        stored = {name: file.tensors[full_name] for name, (file, full_name) in tensors.items()}
        check_tensors(
            f"the weights in {directory}",
            {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()},
            expected,
            FLOATS,
            _CODES.get(quantization or "", ()),
        )
        if others:
            _warn_of_heads(directory, others)

        def read(name: str, shape: tuple[int, ...]) -> NumpyArray:
            file, full_name = tensors[name]
            return file.read(full_name, None if quantization else dtype)

        return _params(config, read, quantization)


def save_checkpoint(
    directory: str | os.PathLike[str],
    params: Params,
    config: GPT2Config,
    tokenizer: SavesItself | None = None,
    carried: Carried | None = None,
) -> None:
    """Write params (NumPy arrays of float16, float32 or float64), config and tokenizer as transformers would.

    `carried` is what the checkpoint that they come from says besides: its entries and files are written again.

    The directory is made if need be. All files are written aside and only then take their names, so a failure leaves
    a former checkpoint whole, and arrays mapped from it stay as they were (Windows refuses to replace a mapped file).
    Raises `CheckpointError` where params and config do not fit, before anything is written, where writing fails, and
    where the directory has the `tokenizer.json` of another tokenizer, which would be read in place of the one given.
    """
    quantization = quantization_of(params)
    tensors = _named_arrays(params, config, quantization)
    stated, generation = ({}, {}) if carried is None else (carried.config, carried.generation)
    dtype = str(tensors["transformer.wpe.weight"].dtype)
    entries, generation = config_entries(config, dtype, quantization, stated, generation)
    with _writing(directory):
        os.makedirs(directory, exist_ok=True)
        with TemporaryDirectory(prefix=SAVING, dir=directory) as aside:
            if tokenizer is not None:
                tokenizer.check_place(directory)
                tokenizer.save(aside)
            write_json(os.path.join(aside, CONFIG), entries)
            if generation or exists(os.path.join(directory, GENERATION_CONFIG)):  # that of an older model must not stay
                write_json(os.path.join(aside, GENERATION_CONFIG), generation)
            if carried is not None:
                carried.copy_files(aside, directory)
            _write_weights(os.path.join(aside, WEIGHTS), tensors)
            _move_all(aside, directory)


def align_weights(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Copy a safetensors file, aligned and without the mask buffers; return the SHA-256 of the copy, in hexadecimal.

    The header of the published GPT-2 files is of odd length, so that no float32 in them can be mapped: they would be
    read into memory at each load. Names, dtypes and metadata are kept. The copy is written aside, in the directory of
    `target`, and only then takes its name. Raises `CheckpointError` where `source` is damaged or unreadable, holds
    tensors that are no floats, or the copy cannot be written.
    """
    try:
        with open_safetensors(os.fspath(source)) as file:
            stored = {name: tensor for name, tensor in file.tensors.items() if not _is_buffer(name)}
            for name, tensor in stored.items():
                if tensor.dtype not in FLOATS:
                    raise CheckpointError(
                        f"{source} holds {name!r:.80} as {tensor.dtype}, and weights are one of {', '.join(FLOATS)}; "
                        f"take the file of a GPT-2"
                    )
            with written_aside(target, sum(tensor.end - tensor.start for tensor in stored.values())) as temporary:
                return write_safetensors(
                    temporary,
                    {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()},
                    file.raw,
                    {"format": "pt"} | file.metadata,  # without a format transformers refuses the file
                )
    except OSError as error:
        raise CheckpointError(f"cannot read {source} ({error}); check the file and its permissions") from error


# --- params and names -----------------------------------------------------------------------------------------------


def _params(config: GPT2Config, leaf: Callable[[str, tuple[int, ...]], Any], quantization: str | None = None) -> Params:
    """The params tree with `leaf(name, shape)` in each place: the one list of names, for reading and writing."""
    n_embd = config.n_embd

    def quantized(name: str, rows: int, columns: int) -> tuple[Any, Any]:
        q, scale = stored_shapes(str(quantization), rows, columns)
        return leaf(name, q), leaf(f"{name}{_SCALE}", scale)

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
    """The names of the tensors of a GPT-2, without prefix, and their shapes.

    `n_tensors` are there. Raises `CheckpointError` where the config has more layers than that.
    """
    # Before a list is made of as many layers as a config may claim.
    if config.n_layer > n_tensors:
        raise CheckpointError(
            f"the config has {config.n_layer} layers, but there are only {n_tensors} tensors; "
            f"take weights and config of one GPT-2"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    _params(config, shapes.__setitem__, quantization)
    return shapes


def check_params(params: Params, config: GPT2Config) -> None:
    """Raise `ConfigError` unless `params` is a tree of arrays, quantized or not, of the shapes that `config` has."""
    tree = tree_map(lambda leaf: leaf, params)  # tuples become lists
    quantization = quantization_of(tree)
    names = _params(config, lambda name, shape: (name, shape), quantization)
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
    found: dict[str, tuple[tuple[int, ...], str]],  # name: (shape, dtype)
    expected: dict[str, tuple[int, ...]],
    dtypes: Iterable[str],
    codes: Iterable[str] = (),  # the dtypes of what has a scale
) -> None:
    """Raise `CheckpointError`, which names them, where tensors are missing, unknown, or of another shape or dtype."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, (shape, dtype) in found.items():
        if name not in expected:
            faults.append(f"{name!r:.80} is no tensor of this GPT-2")
        elif shape != expected[name]:
            faults.append(f"{name} is {list(shape)!s:.80} instead of {list(expected[name])}")
        elif dtype not in (allowed := codes if f"{name}{_SCALE}" in expected else dtypes):
            faults.append(f"{name} is {dtype} instead of one of {', '.join(allowed)}")
    if faults:
        shown = "; ".join(faults[:_MAX_FAULTS])
        more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise CheckpointError(f"{what} do not fit the config: {shown}{more}. Take weights and config of one GPT-2")


# --- reading --------------------------------------------------------------------------------------------------------


def _open_weights(directory: str | os.PathLike[str], stack: ExitStack) -> list[SafetensorsFile]:
    path = os.path.join(directory, WEIGHTS)
    if exists(path):
        return [stack.enter_context(open_safetensors(path))]
    if exists(f"{path}.index.json"):
        return _open_shards(directory, f"{path}.index.json", stack)
    if any(exists(os.path.join(directory, name)) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        raise CheckpointError(
            f"{directory} has its weights only in pytorch_model.bin, a pickle, which can run any code when it is "
            f"opened. Convert it where you trust it: GPT2LMHeadModel.from_pretrained({str(directory)!r})"
            f'.save_pretrained("new-directory"), with GPT2LMHeadModel from transformers'
        )
    raise CheckpointError(
        f"{directory} has no weights that gpt-xp knows: {WEIGHTS}, or shards of it with {WEIGHTS}.index.json, "
        f"was expected, as transformers' save_pretrained writes it"
    )


def _open_shards(directory: str | os.PathLike[str], index: str, stack: ExitStack) -> list[SafetensorsFile]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch or save it again")
    files: dict[str, SafetensorsFile] = {}
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index} places {name!r:.80} in {shard!r:.80}; the plain name of a .safetensors file was expected"
            )
        if shard not in files:
            path = os.path.join(directory, shard)
            if not exists(path):
                raise CheckpointError(f"{directory} lacks {shard}, which its index names; fetch that file")
            files[shard] = stack.enter_context(open_safetensors(path))
        if name not in files[shard].tensors and not _may_lack(name):
            raise CheckpointError(
                f"{index} places {name!r:.80} in {shard}, where it is not; fetch or save the checkpoint again"
            )
    return list(files.values())


def _may_lack(full_name: str) -> bool:
    """Whether an index may place this tensor where it is not: a constant, or one of two names of one matrix."""
    return _is_buffer(full_name) or full_name.removeprefix(_PREFIX) in (_TABLE, _HEAD)


def _by_name(files: list[SafetensorsFile]) -> _Tensors:
    """Return the tensors by the names of OpenAI's model, with their files and their names there."""
    tensors: _Tensors = {}
    for file in files:
        for full_name in file.tensors:
            if _is_buffer(full_name):
                continue
            name = full_name.removeprefix(_PREFIX)
            if name in tensors:
                raise CheckpointError(
                    f"{name!r:.80} is in {tensors[name][0].path} and again in {file.path}; only one was expected: "
                    f"save the checkpoint again"
                )
            tensors[name] = (file, full_name)
    return tensors


def _is_buffer(full_name: str) -> bool:
    return _BUFFER.fullmatch(full_name.removeprefix(_PREFIX)) is not None


def _check_prefix(directory: str | os.PathLike[str], tensors: _Tensors) -> None:
    """Raise `CheckpointError` where a wrapper of the model has put something before all names."""
    names = [full_name for _, full_name in tensors.values()]
    end = "wpe.weight"  # each GPT-2 has it, under this name alone
    prefix = next((name.removesuffix(end).removesuffix(_PREFIX) for name in names if name.endswith(f".{end}")), "")
    if prefix and all(name.startswith(prefix) for name in names):
        raise CheckpointError(
            f"the names of all tensors in {directory} begin with {prefix!r:.80}, as a wrapper of the model leaves them "
            f"(torch.compile: '_orig_mod.', DistributedDataParallel: 'module.'). Save the model inside the wrapper, "
            f"model.{prefix[:-1]:.80}.save_pretrained(...), or take {prefix!r:.80} off the names"
        )


def _unite_tied(directory: str | os.PathLike[str], tensors: _Tensors) -> None:
    """Leave the name `wte.weight` alone to the matrix that GPT-2 has for its embedding and its head.

    Raises `CheckpointError` where there are two matrices that differ, or where `config.json` speaks of two.
    """
    there = [name for name in (_TABLE, _HEAD) if name in tensors]
    if len(there) == 2:
        if not _are_equal(tensors[_TABLE], tensors[_HEAD]):
            raise CheckpointError(
                f"{_HEAD} in {tensors[_HEAD][0].path} differs from {_TABLE}, and GPT-2 has one matrix for both; "
                f"take a checkpoint with tied embeddings"
            )
        del tensors[_HEAD]
    elif there and not _is_tied(directory):
        [missing] = {_TABLE, _HEAD} - {*there}
        raise CheckpointError(
            f"{directory} has {there[0]} but not {missing}, and by its config.json these are two matrices "
            f"(tie_word_embeddings is false). Where they are one, set it to true; else take a checkpoint with tied "
            f"embeddings"
        )
    elif there == [_HEAD]:  # safetensors.torch.save_model keeps the first name of those that share memory
        tensors[_TABLE] = tensors.pop(_HEAD)


def _is_tied(directory: str | os.PathLike[str]) -> bool:
    path = os.path.join(directory, "config.json")
    return not exists(path) or read_json(path).get("tie_word_embeddings") is not False


def _are_equal(a: tuple[SafetensorsFile, str], b: tuple[SafetensorsFile, str]) -> bool:
    """Whether two tensors have the same bits."""
    (file_a, name_a), (file_b, name_b) = a, b
    stored_a, stored_b = file_a.tensors[name_a], file_b.tensors[name_b]
    if (stored_a.dtype, stored_a.shape) != (stored_b.dtype, stored_b.shape):
        return False
    raw_a, raw_b = file_a.raw(name_a), file_b.raw(name_b)
    # Copies of pieces that stay in the processor's cache: to compare memoryviews takes ten times as long.
    pieces = (slice(start, start + _PIECE) for start in range(0, len(raw_a), _PIECE))
    return all(bytes(raw_a[piece]) == bytes(raw_b[piece]) for piece in pieces)


def _other_heads(tensors: _Tensors) -> list[str]:
    """Return the names of the tensors outside the transformer, such as `score` and `v_head`."""
    return [
        name
        for name, (_, full_name) in tensors.items()
        if not full_name.startswith(_PREFIX) and name.partition(".")[0] not in _PARTS
    ]


def _warn_of_heads(directory: str | os.PathLike[str], names: list[str]) -> None:
    shown = ", ".join(f"{name:.80}" for name in names[:_MAX_FAULTS])
    more = f" and {len(names) - _MAX_FAULTS} more" if len(names) > _MAX_FAULTS else ""
    warnings.warn(
        f"{directory} is loaded without {shown}{more}: GPT-2 has no such tensors; heads for other tasks are not used",
        GptXpWarning,
        stacklevel=3,
    )


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` for anything else, `OSError` as `open` does."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is larger than {_MAX_JSON_BYTES} bytes, which no such file is; fetch it again"
            )
        return parse_json(file.read(), path)


def exists(path: str) -> bool:
    """Whether there is something at `path`. Raises `OSError` where that cannot be known."""
    # os.path.exists would also say no to a directory that may not be searched.
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def reading(directory: str | os.PathLike[str]) -> Iterator[None]:
    """First of all see that the directory is one; then say failures of the machine in our own words."""
    try:
        if not _is_directory(directory):
            raise ModelNotFoundError(f"{str(directory)!r} is no directory; a checkpoint's directory was expected")
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {directory} ({error}); check the files and their permissions") from error
    except MemoryError as error:
        raise DeviceMemoryError(f"not enough memory to read {directory} ({error}); try a smaller dtype") from error


def _is_directory(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False


# --- writing --------------------------------------------------------------------------------------------------------


def _named_arrays(params: Params, config: GPT2Config, quantization: str | None) -> dict[str, NumpyArray]:
    """Names as transformers spells them -> contiguous arrays, once it is sure that they fit the config."""
    found = {path: np.asarray(leaf) for path, leaf in _leaves(params)}
    tensor_shapes(config, len(found), quantization)
    wanted = dict(_leaves(_params(config, lambda name, shape: (name, shape), quantization)))
    check_tensors(
        "the params",
        {path: (array.shape, str(array.dtype)) for path, array in found.items()},
        {path: shape for path, (_, shape) in wanted.items()},
        _DTYPES,
        _CODES.get(quantization or "", ()),
    )
    # save_file writes memory as it lies: a transposed array would be written untransposed.
    return {f"transformer.{name}": np.ascontiguousarray(found[path]) for path, (name, _) in wanted.items()}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of dicts and lists, with their paths: "blocks.0.ln_1.g"."""
    if isinstance(tree, Quantized):
        yield path, tree.q
        yield f"{path}{_SCALE}", tree.scale
        return
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(branch, f"{path}.{key}" if path else str(key))


@contextmanager
def written_aside(target: str | os.PathLike[str], n_bytes: int, fix: str = "check the permissions") -> Iterator[str]:
    """A temporary name beside `target` to write about `n_bytes` to; at the end, that file takes the name of `target`.

    It is of this call alone, so that two may write the same target at once, and is gone after a failure. Raises
    `CheckpointError` where writing or renaming fails; `fix` says what to do where that is not allowed.
    """
    temporary = f"{os.fspath(target)}.{secrets.token_hex(4)}.part"
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in _NO_SPACE:
            fix = f"it needs {size(n_bytes)} there: make room and try again"
        raise CheckpointError(f"cannot write {target} ({error.strerror or error}); {fix}") from error
    finally:
        with suppress(OSError):  # it has been renamed, or was never made
            os.remove(temporary)


def write_json(path: str, entries: dict[str, Any]) -> None:
    """Write a JSON object, one entry to a line."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=2, sort_keys=True)
        file.write("\n")


def _write_weights(path: str, tensors: dict[str, NumpyArray]) -> None:
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(tensors, path, metadata={"format": "pt"})  # without it transformers refuses the file
    os.chmod(path, mode)  # save_file lets the owner alone read; the user's umask decides


def _move_all(aside: str, directory: str | os.PathLike[str]) -> None:
    for name in os.listdir(aside):
        sync(os.path.join(aside, name))
    # The weights first: they are the file that may be impossible to replace, on Windows while it is mapped.
    for name in sorted(os.listdir(aside), key=lambda name: name != WEIGHTS):
        os.replace(os.path.join(aside, name), os.path.join(directory, name))


def sync(path: str) -> None:
    """Wait until a file is on the disk: else a power cut after its renaming could leave a name without its bytes."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _writing(directory: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save to {directory} ({error}); every file that was there is still whole. Check the space and the "
            f"permissions, or save to another directory"
        ) from error
