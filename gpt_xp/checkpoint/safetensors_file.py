"""Map or read the tensors of one safetensors file, and write such a file.

The format is that of github.com/huggingface/safetensors (README, "Format"). First come 8 bytes, the length of the
header in little-endian. The header is JSON with each tensor's dtype, shape and place. Then come the tensors' bytes.

The `safetensors` library checks the file. The header is parsed here again, because mapping needs the place of
each tensor, which the library does not tell. A file is written here because the library needs all tensors in memory.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gpt_xp.checked_files import mapping_errors, open_regular, parse_json
from gpt_xp.errors import CheckpointError
from gpt_xp.types import NumpyArray

# NumPy has no bfloat16. Its values are read as 16-bit integers and widened to float32.
_ON_DISK: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
FLOATS = tuple(_ON_DISK)
_ON_DISK |= {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}  # Quantized weights have codes of these dtypes.
_ON_DISK["I32"] = np.dtype("<i4")  # An optimizer has counters of this dtype.

_ALIGNMENT = 64  # bytes of a cache line, and of the widest vector register
_WRITTEN_BYTES = 2**20  # A block stays in the processor's cache while it is hashed.


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header describes it: the format's name of its dtype ("F32"), its shape and its place."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


class SafetensorsFile:
    """An open safetensors file, made by `open_safetensors`.

    `tensors` maps names to `StoredTensor`. `metadata` has the texts that the writer of the file put into its header.
    """

    def __init__(self, path: str, file: BufferedReader, mapping: mmap.mmap) -> None:
        self.path = path
        self.tensors, self.metadata = _parse_header(path, mapping)
        self._file = file
        self._mapping = mapping

    def read(self, name: str, dtype: npt.DTypeLike | None = None, *, aligned: bool = True) -> NumpyArray:
        """Return one tensor as a read-only array of `dtype` (None: as stored, bfloat16 as float32).

        It is mapped, not copied, where the file holds that dtype. With `aligned`, a misaligned one is copied. A mapped
        array stays valid when the file is closed, or replaced by another of the same name. Raises `CheckpointError`
        where a value is too large for `dtype`, or the file has become shorter.
        """
        tensor = self.tensors[name]
        on_disk = _ON_DISK[tensor.dtype]
        stored: np.dtype[Any] = np.dtype(np.float32) if tensor.dtype == "BF16" else on_disk
        wanted: np.dtype[Any] = stored if dtype is None else np.dtype(dtype)
        # NumPy copies a misaligned matrix at every product, which is 3-4 times slower than one copy here. All tensors
        # of the published GPT-2 files are misaligned, because the length of their headers is odd.
        if wanted == on_disk and not (aligned and tensor.start % on_disk.itemsize):
            n_values = math.prod(tensor.shape)
            return np.frombuffer(self._mapping, on_disk, n_values, tensor.start).reshape(tensor.shape)
        array = self._read_aligned(tensor, on_disk)
        if tensor.dtype == "BF16":
            array = _widen(array)
        if array.dtype != wanted:
            array = self._convert(name, array, wanted)
        array.flags.writeable = False  # Mapped arrays are read-only, and alignment must make no difference.
        return array

    def raw(self, name: str) -> memoryview:
        """Return the bytes of one tensor as they are in the file, mapped."""
        tensor = self.tensors[name]
        return memoryview(self._mapping)[tensor.start : tensor.end]

    def _read_aligned(self, tensor: StoredTensor, on_disk: np.dtype[Any]) -> NumpyArray:
        # This reads the file. A copy from the map would also count the pages of the map as resident memory.
        array = _aligned_empty(tensor.shape, on_disk)
        self._file.seek(tensor.start)
        if self._file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise CheckpointError(f"{self.path} became shorter while it was read; load it again")
        return array

    def _convert(self, name: str, array: NumpyArray, dtype: np.dtype[Any]) -> NumpyArray:
        converted = _aligned_empty(array.shape, dtype)
        try:
            with np.errstate(over="raise", under="ignore", invalid="ignore"):
                converted[...] = array
        except FloatingPointError as error:
            raise CheckpointError(
                f"{self.path}: {name} holds values too large for {dtype}; ask for a wider dtype"
            ) from error
        return converted


@contextmanager
def open_safetensors(path: str) -> Iterator[SafetensorsFile]:
    """Open and check a safetensors file. Raises `CheckpointError` for a damaged one, and `OSError` as `open` does."""
    with open_regular(path) as file:
        mapping = _map(path, file)
        try:
            _check(path)
            yield SafetensorsFile(path, file, mapping)
        finally:
            with suppress(BufferError):  # If mapped arrays exist, the map closes with the last of them.
                mapping.close()  # Windows neither deletes nor replaces a mapped file


def write_safetensors(
    path: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Any],
    metadata: Mapping[str, str],
) -> str:
    """Write a safetensors file, one tensor in memory at a time, and return the SHA-256 of the file, in hexadecimal.

    `tensors` maps each name to the format's name of its dtype (one of `FLOATS`) and its shape. `read(name)` returns its
    bytes, C-contiguous and little-endian, as an object with the buffer protocol. Every tensor begins at a multiple of
    its item size, and of 64 bytes where the sizes of the earlier ones allow. The file is on the disk when this returns.
    A failure leaves a part of the file, so give it a temporary name and rename it.

    Raises `CheckpointError` where `read` gives another number of bytes, and `OSError` as `open` does.
    """
    # Wide dtypes come first, as in the safetensors library. An odd number of float16 would misalign a float32.
    stored = dict(sorted(tensors.items(), key=lambda item: -_ON_DISK[item[1][0]].itemsize))
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(_header(stored, metadata))
        for name, (dtype, shape) in stored.items():
            _write_tensor(name, read(name), n_bytes(dtype, shape), write)
        file.flush()
        os.fsync(file.fileno())  # Otherwise a power cut after renaming could lose the content.
    return digest.hexdigest()


def _check(path: str) -> None:
    """Let the library check the header against the file: lengths, dtypes, shapes, places without gap or overlap."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _map(path: str, file: BufferedReader) -> mmap.mmap:
    try:
        with mapping_errors(path):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap raises this for an empty file.
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> CheckpointError:
    problem = f"{path} is truncated, damaged or no safetensors file ({error!s:.200})"
    return CheckpointError(f"{problem}; fetch or save it again")


def _parse_header(path: str, mapping: mmap.mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    data_start = 8 + int.from_bytes(mapping[:8], "little")
    header = parse_json(mapping[8:data_start], path)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *(data_start + n for n in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return tensors, metadata


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the JSON, padded so that the tensors begin at a multiple of `_ALIGNMENT`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + n_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of that shape; `dtype` is the format's name of it, such as "F32"."""
    return math.prod(shape) * _ON_DISK[dtype].itemsize


def _write_tensor(name: str, data: Any, n_bytes: int, write: Callable[[memoryview], None]) -> None:
    with memoryview(data) as view:
        if view.nbytes != n_bytes:
            raise CheckpointError(f"{name!r:.80} has {view.nbytes} bytes instead of {n_bytes}")
        if n_bytes == 0:  # A view with a zero in its shape cannot be cast.
            return
        with view.cast("B") as content:
            for start in range(0, n_bytes, _WRITTEN_BYTES):
                write(content[start : start + _WRITTEN_BYTES])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NumpyArray:
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def _widen(bfloat16: NumpyArray) -> NumpyArray:
    """Return bfloat16 values as float32. The bits of a bfloat16 are the upper half of that float32."""
    bits = _aligned_empty(bfloat16.shape, np.dtype(np.uint32))
    bits[...] = bfloat16
    bits <<= 16
    return bits.view(np.float32)
