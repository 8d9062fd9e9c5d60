"""One safetensors file: damage is refused, and the library reads what is written."""

import errno
import hashlib
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    POINTER,
    TINY,
    UNCHECKED,
    WEIGHTS,
    file_bytes,
    header_of,
    leaves,
    make_tensors,
    nested,
    write_checkpoint,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from gpt_xp.checkpoint import safetensors_file
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.safetensors_file import open_safetensors, write_safetensors
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import CheckpointError

# --- reading: damaged files -----------------------------------------------------------------------------------------


def changed(name, **entry):
    def change(header):
        header[name] = header[name] | entry

    return change


def twice(header):
    again = json.dumps({"ln_f.bias": header["ln_f.bias"]})
    return f"{json.dumps(header)[:-1]}, {again[1:]}".encode()


LIES = {
    "offsets beyond the file": changed("ln_f.bias", data_offsets=[10**6, 10**6 + 12]),
    "offsets that overlap": changed("ln_f.bias", data_offsets=[0, 12]),
    "offsets backwards": changed("ln_f.bias", data_offsets=[12, 0]),
    "negative offsets": changed("ln_f.bias", data_offsets=[-12, 0]),
    "bytes that are not dtype times shape": changed("ln_f.bias", dtype="F64"),
    "a shape that is not its bytes": changed("ln_f.bias", shape=[4]),
    "a negative shape": changed("ln_f.bias", shape=[-3]),
    "a shape of fractions": changed("ln_f.bias", shape=[3.0]),
    "a shape that overflows": changed("ln_f.bias", shape=[2**32, 2**32, 2**32]),
    "an absurd shape": changed("ln_f.bias", shape=[10**4000]),
    "an unknown dtype": changed("ln_f.bias", dtype="F31"),
    "no shape": lambda header: header["ln_f.bias"].pop("shape"),
    "an entry that is no object": lambda header: header.update({"ln_f.bias": 5}),
    "metadata that are no texts": lambda header: header.update({"__metadata__": {"format": 5}}),
    "a name twice": twice,
    "no object": lambda header: b"[]",
    "no JSON": lambda header: b"{" * 64,
    "deep nesting": lambda header: b'{"a":' * 100_000,
    "no UTF-8": lambda header: b'{"\xff\xfe":1}',
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(tmp_path, lie):
    tensors = make_tensors(TINY)
    header = header_of(tensors)
    result = lie(header)
    write_checkpoint(tmp_path, tensors, TINY, header=result if isinstance(result, bytes) else header)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_params(tmp_path, TINY)


@pytest.mark.parametrize("n_bytes", [0, 1, 7, 8, 9, 100, -1, -12])
def test_a_truncated_file_is_refused(tmp_path, n_bytes):
    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:n_bytes])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is truncated, damaged or no safetensors file.*again"):
        read_params(tmp_path, TINY)


@pytest.mark.parametrize("length", [0, 10**6, 2**63 - 1, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError, match="is truncated, damaged or no safetensors file"):
        read_params(tmp_path, TINY)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("scratch"), make_tensors(TINY), TINY)


WHOLE = file_bytes(make_tensors(TINY), header_length=1501)


places = st.integers(0, 8 + 1501 - 1)


@st.composite
def damaged(draw):
    """A file with bytes of its header changed, taken out or put in, and perhaps its end cut off."""
    file = bytearray(WHOLE)
    for place in draw(st.lists(places, max_size=4)):
        kind = draw(st.sampled_from(["digit", "any", "out", "in"]))
        if kind == "out":
            del file[place]
        else:
            byte = draw(st.sampled_from(b"0123456789") if kind == "digit" else st.integers(0, 255))
            file[place : place + (kind != "in")] = bytes([byte])
    return bytes(file[: len(file) - draw(st.sampled_from([0, 0, 0, 1, 4, 12, 500]))])


@settings(max_examples=600, deadline=None, suppress_health_check=UNCHECKED)
@given(damaged(), st.sampled_from(["float16", "float32", None]))
def test_damage_gives_a_checkpoint_error_or_the_right_shapes(scratch, file, dtype):
    (scratch / WEIGHTS).write_bytes(file)
    try:
        params = read_params(scratch, TINY, dtype)
    except CheckpointError:
        return
    for array, wanted in zip(leaves(params), leaves(nested(make_tensors(TINY))), strict=True):
        assert array.shape == wanted.shape
        assert array.dtype == (dtype or array.dtype)
        np.sum(array.astype(np.float64) > 0)  # every value can be touched


@settings(max_examples=200, deadline=None, suppress_health_check=UNCHECKED)
@given(st.binary(max_size=200))
def test_random_bytes_give_a_checkpoint_error(scratch, file):
    (scratch / WEIGHTS).write_bytes(file)
    with pytest.raises(CheckpointError):
        read_params(scratch, TINY)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, f"{WEIGHTS}.index.json"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    if name.endswith("index.json"):
        (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"/{re.escape(name)} is only a pointer of Git LFS.*git lfs pull"):
        read_params(tmp_path, read_config(tmp_path))


def test_a_shard_that_is_a_pointer_is_told(tmp_path, parts):
    names, _ = write_shards(tmp_path, parts)
    (tmp_path / names[1]).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{names[1]} is only a pointer of Git LFS"):
        read_params(tmp_path, CONFIG)


@pytest.mark.skipif(not os.path.exists("/sys/kernel/uevent_seqnum"), reason="needs the sysfs of Linux")
def test_a_file_system_that_maps_no_files_is_told(tmp_path):
    """Files of sysfs cannot be mapped, whoever asks; nor can those of some network file systems."""
    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).symlink_to("/sys/kernel/uevent_seqnum")
    with pytest.raises(CheckpointError, match=rf"/{WEIGHTS} is on a file system that cannot map .*copy its directory"):
        read_params(tmp_path, TINY)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL])
def test_a_map_that_is_refused_is_told(tmp_path, monkeypatch, number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    monkeypatch.setattr(safetensors_file.mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=rf"/{WEIGHTS} is on a file system that cannot map .*local disk"):
        read_params(tmp_path, TINY)


# --- writing one file, tensor by tensor -----------------------------------------------------------------------------

KINDS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}


# No lone surrogates: they have no UTF-8 form.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=200, deadline=None, suppress_health_check=UNCHECKED)
@given(
    entries=st.dictionaries(
        texts.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(KINDS)), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(texts, texts, max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_library_reads_what_is_written(scratch, entries, metadata, seed):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 30000, shape).astype(KINDS[code]) for name, (code, shape) in entries.items()}
    path = scratch / "written.safetensors"
    asked = []

    def read(name):
        asked.append(name)
        return arrays[name]

    tensors = {name: (code, tuple(shape)) for name, (code, shape) in entries.items()}
    digest = write_safetensors(str(path), tensors, read, metadata)
    whole = path.read_bytes()
    assert digest == hashlib.sha256(whole).hexdigest()
    assert sorted(asked) == sorted(arrays)  # each once
    found = dict(deserialize(whole))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name]["dtype"], found[name]["shape"]) == (entries[name][0], entries[name][1])
        assert bytes(found[name]["data"]) == array.tobytes()
    with safe_open(path, framework="np") as file:
        assert (file.metadata() or {}) == metadata
    with open_safetensors(str(path)) as file:
        assert file.metadata == metadata
        assert min((tensor.start for tensor in file.tensors.values()), default=0) % 64 == 0
        for name, tensor in file.tensors.items():
            assert tensor.start % arrays[name].itemsize == 0
            assert bytes(file.raw(name)) == arrays[name].tobytes()


@pytest.mark.parametrize("data", [b"", b"1234567", b"123456789"])
def test_a_tensor_of_the_wrong_length_is_refused(tmp_path, data):
    with pytest.raises(CheckpointError, match=rf"'w' has {len(data)} bytes instead of 8"):
        write_safetensors(str(tmp_path / "x"), {"w": ("F32", (2,))}, lambda name: data, {})


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    n_values = 1_000_000
    tensors = {f"w{i}": ("F32", (n_values,)) for i in range(5)}
    tracemalloc.start()
    write_safetensors(str(tmp_path / "x"), tensors, lambda name: np.arange(n_values, dtype=np.float32), {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * 4 * n_values
    with safe_open(tmp_path / "x", framework="np") as file:
        assert all((file.get_tensor(name) == np.arange(n_values, dtype=np.float32)).all() for name in tensors)


def test_what_is_written_reaches_the_disk(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write_safetensors(str(tmp_path / "x"), {"w": ("F32", (2,))}, lambda name: b"12345678", {})
    assert sizes == [(tmp_path / "x").stat().st_size]


def test_a_file_is_unmapped_when_it_is_closed_or_when_its_last_array_goes(tmp_path):
    write_checkpoint(tmp_path, make_tensors(TINY), TINY)
    with open_safetensors(str(tmp_path / WEIGHTS)) as file:
        bytes(file.raw("ln_f.bias"))
        mapping = file._mapping
    assert mapping.closed  # so that Windows can delete the file
    with open_safetensors(str(tmp_path / WEIGHTS)) as file:
        array, mapping = file.read("ln_f.bias"), file._mapping
    assert not mapping.closed
    assert array.tobytes() == make_tensors(TINY)["ln_f.bias"].tobytes()
