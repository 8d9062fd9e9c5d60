"""Directories that hold no checkpoint, or files that cannot be read: one clear error each."""

import errno
import os
import sys

import pytest
from checkpoint_files import CONFIG, PUBLISHED_HEADER, WEIGHTS, assert_same, make_tensors, write_checkpoint

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import CheckpointError, DeviceMemoryError, ModelNotFoundError

# --- reading: directories that hold something else ------------------------------------------------------------------


def read_both(directory):
    read_config(directory)
    read_params(directory, CONFIG)


@pytest.mark.parametrize("read", [read_config, lambda directory: read_params(directory, CONFIG)])
@pytest.mark.parametrize("name", ["nowhere", "a file", "a file/below", "nul\0"])
def test_no_directory_is_no_model(tmp_path, read, name):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ModelNotFoundError, match="no directory"):
        read(tmp_path / name)


def test_other_layouts_are_refused(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (tmp_path / "hparams.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no config\.json.*model\.safetensors"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights that gpt-xp knows.*model\.safetensors"):
        read_params(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused_with_the_reason_and_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickle.*can run any code.*from_pretrained\(.*\.save_pretrained\("):
        read_params(tmp_path, CONFIG)
    write_checkpoint(tmp_path, make_tensors(CONFIG))
    assert_same(read_params(tmp_path, CONFIG), make_tensors(CONFIG))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links of POSIX")
def test_what_is_no_file_is_refused_and_not_waited_on(tmp_path, name, kind):
    path = write_checkpoint(tmp_path, make_tensors(CONFIG)) / name
    path.unlink()
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}[kind]()
    with pytest.raises(CheckpointError, match=name):
        read_both(tmp_path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_links_are_followed(tmp_path, name):
    """The Hub's cache is made of links to files elsewhere."""
    directory = write_checkpoint(tmp_path / "snapshot", make_tensors(CONFIG))
    (directory / name).rename(tmp_path / "blob")
    (directory / name).symlink_to(tmp_path / "blob")
    assert read_config(directory) == CONFIG
    assert_same(read_params(directory, CONFIG), make_tensors(CONFIG))


@pytest.mark.parametrize("denied", ["config.json", WEIGHTS, ""])
def test_a_permission_that_lacks_is_named(tmp_path, monkeypatch, denied):
    write_checkpoint(tmp_path, make_tensors(CONFIG))
    real = os.stat

    def guarded(path, *args, **kwargs):  # chmod would not stop root, as which tests may run
        if str(path) == str(tmp_path / denied):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(CheckpointError, match=f"Permission denied.*{denied}.*check the files and their permissions"):
        read_both(tmp_path)


def test_memory_that_runs_out_is_a_domain_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, make_tensors(CONFIG), header_length=PUBLISHED_HEADER)

    def refuse(*args):
        raise MemoryError("Unable to allocate 6 GiB")

    monkeypatch.setattr("gpt_xp.checkpoint.safetensors_file._aligned_empty", refuse)
    with pytest.raises(DeviceMemoryError, match=r"not enough memory.*6 GiB"):
        read_params(tmp_path, CONFIG)


def test_an_adapter_alone_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has an adapter \(PEFT\).* merge_and_unload"):
        read_config(tmp_path)
