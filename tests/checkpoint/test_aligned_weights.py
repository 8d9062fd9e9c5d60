"""The aligned copy of a published file: the same tensors without the masks, or no file at all."""

import errno
import hashlib
import io
import os

import numpy as np
import pytest
from checkpoint_files import (
    CODES,
    CONFIG,
    PUBLISHED_HEADER,
    TINY,
    WEIGHTS,
    assert_same,
    contents,
    file_bytes,
    header_of,
    leaves,
    listing,
    make_tensors,
    prefixed,
)
from safetensors import safe_open

from gpt_xp.checkpoint import safetensors_file
from gpt_xp.checkpoint.safetensors_file import open_safetensors
from gpt_xp.checkpoint.weights import align_weights, read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import CheckpointError

# --- the published files, aligned -----------------------------------------------------------------------------------


def published(tensors):
    """A file like the Hub's gpt2: a header of odd length, names without prefix, the masks among the weights."""
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 37, 37), np.float32) for i in range(2)}
    masks["h.0.attn.masked_bias"] = np.float32(-1e4).reshape(())
    header = header_of(masks | tensors) | {"__metadata__": {"format": "pt", "from": "Ångström"}}
    return file_bytes(masks | tensors, header=header, header_length=PUBLISHED_HEADER)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
def test_an_aligned_copy_holds_the_same_without_the_masks(tmp_path, dtype):
    tensors = make_tensors(CONFIG)
    tensors = {name: array.view(np.uint16)[..., ::2] if dtype == "uint16" else array.astype(dtype)
               for name, array in tensors.items()}  # fmt: skip
    source, target = tmp_path / "downloaded", tmp_path / WEIGHTS
    source.write_bytes(published(tensors))
    digest = align_weights(source, target)
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    assert listing(tmp_path) == ["downloaded", WEIGHTS]
    with open_safetensors(str(source)) as before, open_safetensors(str(target)) as after:
        assert set(after.tensors) == set(tensors)
        assert after.metadata == before.metadata == {"format": "pt", "from": "Ångström"}
        for name, tensor in after.tensors.items():
            there = before.tensors[name]
            assert (tensor.dtype, tensor.shape) == (there.dtype, there.shape) == (CODES[dtype], tensors[name].shape)
            assert bytes(after.raw(name)) == bytes(before.raw(name)) == tensors[name].tobytes()
    with safe_open(target, framework="np") as file:
        assert set(file.keys()) == set(tensors)


def test_an_aligned_copy_is_mapped_at_multiples_of_64(tmp_path):
    config = GPT2Config(n_vocab=48, n_ctx=16, n_embd=32, n_head=2, n_layer=1)  # like the real sizes, multiples of 16
    (tmp_path / "downloaded").write_bytes(published(make_tensors(config)))
    align_weights(tmp_path / "downloaded", tmp_path / WEIGHTS)
    params = read_params(tmp_path, config, None)
    assert_same(params, make_tensors(config))
    for array in leaves(params):
        assert isinstance(array.base.base, memoryview)  # of the map
        assert array.ctypes.data % 64 == 0


def test_a_format_that_lacks_is_put_in(tmp_path):
    """Without it transformers refuses the file."""
    (tmp_path / "downloaded").write_bytes(file_bytes(make_tensors(TINY)))
    align_weights(str(tmp_path / "downloaded"), str(tmp_path / WEIGHTS))
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_prefixed_masks_go_too(tmp_path):
    tensors = prefixed(make_tensors(TINY))
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 5, 5), bool)}
    (tmp_path / "downloaded").write_bytes(file_bytes(mask | tensors))
    align_weights(tmp_path / "downloaded", tmp_path / WEIGHTS)
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert set(file.keys()) == set(tensors)


class Disk(io.FileIO):
    """A disk that is full after 20000 bytes."""

    def write(self, data):
        if self.tell() + len(memoryview(data)) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_leaves_nothing_behind_and_says_what_is_needed(tmp_path, monkeypatch):
    (tmp_path / "downloaded").write_bytes(published(make_tensors(CONFIG)))
    (tmp_path / WEIGHTS).write_bytes(b"former")
    needed = sum(array.nbytes for array in make_tensors(CONFIG).values())
    assert needed > 100_000
    real = open

    def guarded(path, mode="r", **options):
        return io.BufferedWriter(Disk(path, "w")) if mode == "wb" else real(path, mode, **options)

    monkeypatch.setattr(safetensors_file, "open", guarded, raising=False)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} \(No space left.*needs 171\.9 kB.*make room") as caught:
        align_weights(tmp_path / "downloaded", tmp_path / WEIGHTS)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"downloaded": published(make_tensors(CONFIG)), WEIGHTS: b"former"}


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_copy_that_cannot_take_its_name_is_removed(tmp_path, monkeypatch, error):
    (tmp_path / "downloaded").write_bytes(published(make_tensors(CONFIG)))

    def refuse(source, destination):
        assert listing(tmp_path) == ["downloaded", os.path.basename(source)]
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        align_weights(tmp_path / "downloaded", tmp_path / WEIGHTS)
    if isinstance(error, OSError):
        assert "Permission denied); check the permissions" in str(caught.value)
    assert listing(tmp_path) == ["downloaded"]


@pytest.mark.parametrize("n_bytes", [0, 100, PUBLISHED_HEADER + 8, -1])
def test_no_copy_is_made_of_a_damaged_file(tmp_path, n_bytes):
    (tmp_path / "downloaded").write_bytes(published(make_tensors(CONFIG))[:n_bytes])
    with pytest.raises(CheckpointError, match="downloaded is truncated, damaged or no safetensors file"):
        align_weights(tmp_path / "downloaded", tmp_path / WEIGHTS)
    assert listing(tmp_path) == ["downloaded"]


def test_no_copy_is_made_of_what_is_missing_or_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere.*No such file"):
        align_weights(tmp_path / "nowhere", tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="not a regular file"):
        align_weights(tmp_path, tmp_path / WEIGHTS)
    (tmp_path / "other").write_bytes(file_bytes({"x": np.ones(3, np.int32)}))
    with pytest.raises(CheckpointError, match=r"other holds 'x' as I32.*F16, F32, F64, BF16"):
        align_weights(tmp_path / "other", tmp_path / WEIGHTS)
    (tmp_path / "other").write_bytes(file_bytes(make_tensors(TINY)))
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere.*No such file"):
        align_weights(tmp_path / "other", tmp_path / "nowhere" / WEIGHTS)
    assert listing(tmp_path) == ["other"]
