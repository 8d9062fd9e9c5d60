"""Saving: the files are those of transformers, and a failure leaves the former checkpoint whole."""

import json
import os
import stat
import sys

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    TINY,
    WEIGHTS,
    TwoFiles,
    assert_same,
    config_entries,
    contents,
    leaves,
    listing,
    make_tensors,
    nested,
    prefixed,
    shapes,
)
from safetensors import safe_open

from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import CheckpointError


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_saved_is_read_again(tmp_path, dtype):
    tensors = make_tensors(CONFIG, dtype)
    directory = tmp_path / "new" / "deeper"
    checkpoint.save(directory, nested(tensors), CONFIG, TwoFiles())
    assert listing(directory) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert (directory / "vocab.json").read_text() == "vocab.json"
    assert read_config(directory) == CONFIG
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
    params = read_params(directory, CONFIG, None)
    assert_same(params, tensors, dtype)
    assert all(array.flags.aligned for array in leaves(params))


def test_a_tokenizer_that_would_not_be_read_is_not_saved(tmp_path):
    (tmp_path / "tokenizer.json").write_text("another")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG, TwoFiles())
    assert listing(tmp_path) == ["tokenizer.json"]
    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG)
    assert listing(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_names_are_those_of_transformers(tmp_path):
    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG)
    assert listing(tmp_path) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert set(file.keys()) == set(prefixed(shapes(CONFIG)))
        assert file.metadata() == {"format": "pt"}
    entries = json.loads((tmp_path / "config.json").read_text())
    wanted = config_entries(CONFIG, architectures=["GPT2LMHeadModel"], dtype="float32", n_inner=None)
    assert entries | wanted == entries


def test_no_eos_token_stays_none(tmp_path):
    checkpoint.save(tmp_path, nested(make_tensors(TINY)), TINY)
    assert read_config(tmp_path) == TINY


def test_arrays_are_saved_by_value_however_they_lie_in_memory(tmp_path):
    tensors = make_tensors(CONFIG)
    scattered = {name: np.asfortranarray(array) for name, array in tensors.items()}
    scattered["ln_f.bias"] = np.repeat(tensors["ln_f.bias"], 2)[::2]
    checkpoint.save(tmp_path, nested(scattered), CONFIG)
    assert_same(read_params(tmp_path, CONFIG), tensors)


def test_saving_over_mapped_files(tmp_path):
    old = make_tensors(CONFIG)
    new = {name: array + 1 for name, array in old.items()}
    checkpoint.save(tmp_path, nested(old), CONFIG)
    params = read_params(tmp_path, CONFIG)
    checkpoint.save(tmp_path, nested(new), CONFIG)
    assert_same(params, old)
    assert_same(read_params(tmp_path, CONFIG), new)
    checkpoint.save(tmp_path, params, CONFIG)  # and from a map into the directory it is mapped from
    assert_same(read_params(tmp_path, CONFIG), old)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG, TwoFiles())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def spoil(tree, *path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("wte",), np.ones((39, 101), np.float32), r"wte is \[39, 101\] instead of \[101, 39\]"),
        (("wte",), np.ones((101, 39), np.int32), "wte is int32 instead of one of float16, float32, float64"),
        (("wte",), np.ones((101, 39), ">f4"), "wte is >f4 instead"),
        (("blocks", 1, "attn", "c_attn"), {}, r"blocks\.1\.attn\.c_attn\.w is missing"),
        (("ln_f", "w"), np.ones(39, np.float32), r"'ln_f\.w' is no tensor"),
        (("blocks",), [], r"blocks\.0\.ln_1\.g is missing.*and 18 more"),
        (("ln_f",), None, r"ln_f\.g is missing"),
    ],
)
def test_params_that_do_not_fit_are_not_written(tmp_path, path, value, complaint):
    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG)
    before = contents(tmp_path)
    params = nested(make_tensors(CONFIG, seed=1))
    spoil(params, *path, value=value)
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint.save(tmp_path, params, CONFIG)
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [100, 5000])  # bytes: config.json does not fit; only the weights do not fit
def test_a_disk_that_is_full_leaves_the_former_checkpoint(tmp_path, limit):
    import resource

    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG, TwoFiles())
    before = contents(tmp_path)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save to .*File too large.*still whole.*another directory"):
            checkpoint.save(tmp_path, nested(make_tensors(CONFIG, seed=1)), CONFIG, TwoFiles())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [PermissionError("mapped"), KeyboardInterrupt()])
def test_everything_is_written_before_the_first_file_is_replaced(tmp_path, monkeypatch, error):
    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG, TwoFiles())
    before = contents(tmp_path)
    aside = {}

    def stop(source, destination):
        aside.update(contents(type(tmp_path)(source).parent))
        raise error

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        checkpoint.save(tmp_path, nested(make_tensors(CONFIG, seed=1)), CONFIG, TwoFiles())
    assert contents(tmp_path) == before
    assert {name: len(content) for name, content in aside.items()} == {n: len(c) for n, c in before.items()}
    assert aside[WEIGHTS] != before[WEIGHTS]


def test_files_reach_the_disk_before_they_take_their_names(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(os.path.basename(new)), replace(old, new)))
    checkpoint.save(tmp_path, nested(make_tensors(CONFIG)), CONFIG, TwoFiles())
    assert events[:5] == ["sync"] * 4 + [WEIGHTS]  # first what Windows may refuse to replace
    assert sorted(events[5:]) == ["config.json", "merges.txt", "vocab.json"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"cannot save to .*file"):
            checkpoint.save(directory, nested(make_tensors(CONFIG)), CONFIG)
    assert contents(tmp_path) == {"file": b"mine"}
