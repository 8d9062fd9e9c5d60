"""Read and write weights: `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

import os
import re
import stat
import warnings
from contextlib import ExitStack

from safetensors.numpy import save_file

from gpt_xp.atomic_files import written_aside
from gpt_xp.checked_files import exists, read_json, reading
from gpt_xp.checkpoint.config_json import is_tied
from gpt_xp.checkpoint.safetensors_file import FLOATS, SafetensorsFile, open_safetensors, write_safetensors
from gpt_xp.checkpoint.tensors import (
    DTYPES,
    MAX_NAMES_SHOWN,
    PREFIX,
    QUANTIZED_DTYPES,
    build_params,
    check_tensors,
    tensor_shapes,
)
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError, CheckpointError, GptXpWarning
from gpt_xp.types import NumpyArray, Params

WEIGHTS = "model.safetensors"

# Old versions of transformers saved these constants with the weights: the causal mask and its fill value.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TABLE, _HEAD = "wte.weight", "lm_head.weight"  # GPT-2 has one matrix for both. A file has one name or both.
_PARTS = ("wte", "wpe", "h", "ln_f", "lm_head")  # Other names outside the transformer belong to additional heads.
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")  # A name without a path keeps an index inside its directory.
_COMPARED_BYTES = 2**16  # Two such parts stay in the processor's cache.

_Tensors = dict[str, tuple[SafetensorsFile, str]]  # name: (file, name in the file)


def read_params(
    directory: str | os.PathLike[str],
    config: GPT2Config,
    dtype: str | None = "float32",
    quantization: str | None = None,
    *,
    is_tied: bool | None = None,
    aligned: bool = True,
) -> Params:
    """Return the parameters in a directory, as a nested dict of read-only NumPy arrays.

    `dtype` is "float16", "float32", "float64", or None (each tensor as stored, bfloat16 as float32). With E = n_embd:

        {"wte": [n_vocab, E], "wpe": [n_ctx, E], "blocks": [block, ...], "ln_f": {"g": [E], "b": [E]}}

    and each of the n_layer blocks is

        {"ln_1": {"g": [E], "b": [E]}, "attn": {"c_attn": {"w": [E, 3E], "b": [3E]}, "c_proj": {"w": [E, E], "b": [E]}},
         "ln_2": {"g": [E], "b": [E]}, "mlp": {"c_fc": {"w": [E, 4E], "b": [4E]}, "c_proj": {"w": [4E, E], "b": [E]}}}

    With a `quantization` (see `config_json.stated_quantization`), `wte` is a `QuantizedTable` and every `w` a
    `QuantizedWeight`, and all are as stored. `is_tied` says whether embedding and head are one matrix, so that
    a file may have only one of the names. The default is what `config.json` says, or True without that file.

    An array is mapped where the file holds `dtype` at an aligned place. Otherwise it is read into aligned memory.
    With `aligned=False`, misaligned arrays are mapped too, for callers that copy every array.
    Do not write to a mapped file. `checkpoint.save` replaces the file, and the arrays do not change. Heads for other
    tasks (`score`, `v_head`) are left out, with a `GptXpWarning`.

    Raises `ModelNotFoundError` where there is no such directory, and `BackendError` for another dtype. Raises
    `CheckpointError` where the files are damaged, unreadable or do not fit `config`. Raises `DeviceMemoryError` where
    memory runs out.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BackendError(f"dtype {dtype!r} cannot be read; take one of {', '.join(DTYPES)}")
    with reading(directory), ExitStack() as stack:
        tensors = _by_name(_open_weights(directory, stack))
        _check_prefix(directory, tensors)
        _unite_tied(directory, tensors, is_tied)
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
            QUANTIZED_DTYPES[quantization],
        )
        if others:
            _warn_of_heads(directory, others)

        def read(name: str, shape: tuple[int, ...]) -> NumpyArray:
            file, full_name = tensors[name]
            return file.read(full_name, None if quantization else dtype, aligned=aligned)

        return build_params(config, read, quantization)


def align_weights(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Copy a safetensors file, aligned and without the mask buffers; return the SHA-256 of the copy, in hexadecimal.

    The header of the published GPT-2 files has an odd length, so no float32 in them can be mapped. Each load would
    read them into memory. Names, dtypes and metadata are kept. The copy gets a temporary name in the directory of
    `target`, and is then renamed. Raises `CheckpointError` where `source` is damaged or unreadable, or holds tensors
    that are not floats. It is also raised where the copy cannot be written.
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
                    {"format": "pt"} | file.metadata,  # Without a format, transformers refuses the file.
                )
    except OSError as error:
        raise CheckpointError(f"cannot read {source} ({error}); check the file and its permissions") from error


def write_weights(path: str, tensors: dict[str, NumpyArray]) -> None:
    """Write a new safetensors file, which transformers reads too. Raises `OSError` and `SafetensorError`."""
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(tensors, path, metadata={"format": "pt"})  # Without it, transformers refuses the file.
    os.chmod(path, mode)  # save_file lets only the owner read. The user's umask must decide.


# --- the files --------------------------------------------------------------------------------------------------------


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
    """Return whether an index may list a tensor that is missing: a constant, or one of two names of one matrix."""
    return _is_buffer(full_name) or full_name.removeprefix(PREFIX) in (_TABLE, _HEAD)


def _by_name(files: list[SafetensorsFile]) -> _Tensors:
    """Return the tensors by the names of OpenAI's model, with their files and their names there."""
    tensors: _Tensors = {}
    for file in files:
        for full_name in file.tensors:
            if _is_buffer(full_name):
                continue
            name = full_name.removeprefix(PREFIX)
            if name in tensors:
                raise CheckpointError(
                    f"{name!r:.80} is in {tensors[name][0].path} and again in {file.path}; only one was expected: "
                    f"save the checkpoint again"
                )
            tensors[name] = (file, full_name)
    return tensors


def _is_buffer(full_name: str) -> bool:
    return _BUFFER.fullmatch(full_name.removeprefix(PREFIX)) is not None


def _check_prefix(directory: str | os.PathLike[str], tensors: _Tensors) -> None:
    """Raise `CheckpointError` where a wrapper of the model has put a prefix before all names."""
    names = [full_name for _, full_name in tensors.values()]
    end = "wpe.weight"  # Every GPT-2 has it, and always under this name.
    prefix = next((name.removesuffix(end).removesuffix(PREFIX) for name in names if name.endswith(f".{end}")), "")
    if prefix and all(name.startswith(prefix) for name in names):
        raise CheckpointError(
            f"the names of all tensors in {directory} begin with {prefix!r:.80}, as a wrapper of the model leaves them "
            f"(torch.compile: '_orig_mod.', DistributedDataParallel: 'module.'). Save the model inside the wrapper, "
            f"model.{prefix[:-1]:.80}.save_pretrained(...), or take {prefix!r:.80} off the names"
        )


def _unite_tied(directory: str | os.PathLike[str], tensors: _Tensors, is_tied: bool | None) -> None:
    """Keep one name, `wte.weight`, for the matrix that GPT-2 has for its embedding and its head.

    Raises `CheckpointError` where the two matrices differ, or where one is missing and they are not tied.
    """
    there = [name for name in (_TABLE, _HEAD) if name in tensors]
    if len(there) == 2:
        if not _are_equal(tensors[_TABLE], tensors[_HEAD]):
            raise CheckpointError(
                f"{_HEAD} in {tensors[_HEAD][0].path} differs from {_TABLE}, and GPT-2 has one matrix for both; "
                f"take a checkpoint with tied embeddings"
            )
        del tensors[_HEAD]
    elif there and not (_says_tied(directory) if is_tied is None else is_tied):
        [missing] = {_TABLE, _HEAD} - {*there}
        raise CheckpointError(
            f"{directory} has {there[0]} but not {missing}, and by its config.json these are two matrices "
            f"(tie_word_embeddings is false). Where they are one, set it to true; else take a checkpoint with tied "
            f"embeddings"
        )
    elif there == [_HEAD]:  # safetensors.torch.save_model keeps only the first name of shared memory.
        tensors[_TABLE] = tensors.pop(_HEAD)


def _says_tied(directory: str | os.PathLike[str]) -> bool:
    path = os.path.join(directory, "config.json")
    return not exists(path) or is_tied(read_json(path))


def _are_equal(a: tuple[SafetensorsFile, str], b: tuple[SafetensorsFile, str]) -> bool:
    """Return whether two tensors have the same bits."""
    (file_a, name_a), (file_b, name_b) = a, b
    stored_a, stored_b = file_a.tensors[name_a], file_b.tensors[name_b]
    if (stored_a.dtype, stored_a.shape) != (stored_b.dtype, stored_b.shape):
        return False
    raw_a, raw_b = file_a.raw(name_a), file_b.raw(name_b)
    # Copies are compared, because comparing memoryviews takes ten times as long.
    parts = (slice(start, start + _COMPARED_BYTES) for start in range(0, len(raw_a), _COMPARED_BYTES))
    return all(bytes(raw_a[part]) == bytes(raw_b[part]) for part in parts)


def _other_heads(tensors: _Tensors) -> list[str]:
    """Return the names of the tensors outside the transformer, such as `score` and `v_head`."""
    return [
        name
        for name, (_, full_name) in tensors.items()
        if not full_name.startswith(PREFIX) and name.partition(".")[0] not in _PARTS
    ]


def _warn_of_heads(directory: str | os.PathLike[str], names: list[str]) -> None:
    shown = ", ".join(f"{name:.80}" for name in names[:MAX_NAMES_SHOWN])
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    warnings.warn(
        f"{directory} is loaded without {shown}{more}: GPT-2 has no such tensors; heads for other tasks are not used",
        GptXpWarning,
        stacklevel=3,
    )
