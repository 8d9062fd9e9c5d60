"""The models in GPT_XP_HOME: damage is noticed and mended, removed is gone, verified is right."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import small_published
from checkpoint_files import assert_same
from small_published import TENSORS, WEIGHTS, path_of

import gpt_xp
from gpt_xp.environment import gpt_xp_home
from gpt_xp.errors import DownloadError, ModelNotFoundError
from gpt_xp.hub import find as hub
from gpt_xp.hub import store
from gpt_xp.hub.published import MODELS

# --- what is in the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", small_published.hub_files())
@pytest.mark.parametrize("damage", ["one bit", "cut", "gone"])
def test_a_damaged_file_is_noticed_and_fetched_again(server, home, file, damage, capfd):
    gpt_xp.load("124M")
    path = home / "models" / "124M" / "hub" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.unlink() if damage == "gone" else path.write_bytes(content[:-5] if damage == "cut" else content)
    with pytest.raises(ModelNotFoundError, match="offline"):
        hub.find_model("124M", offline=True)
    capfd.readouterr()
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert f"{file} is missing or damaged here" in capfd.readouterr().err
    twice = [name for name in small_published.hub_files() if sum(r.path == path_of(name) for r in server.requests) == 2]
    assert twice == [file]


def test_a_file_that_was_only_touched_is_not_fetched_again(server, home):
    gpt_xp.load("124M")
    asked = len(server.requests)
    for path in (home / "models" / "124M" / "hub").iterdir():
        os.utime(path, (1e9, 1e9))
    assert hub.find_model("124M", offline=True) == home / "models" / "124M" / "hub"
    assert len(server.requests) == asked


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 2, "files": {}}', '{"version": 1, "files": {"a": 3}}'])
def test_a_cache_of_another_version_is_made_anew(server, home, content):
    gpt_xp.load("124M")
    (home / "models" / "124M" / "hub" / "gpt-xp.json").write_text(content)
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


def test_a_cache_folder_that_cannot_be(home, server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("GPT_XP_HOME", str(tmp_path / place))
        with pytest.raises(DownloadError, match="set GPT_XP_HOME to another folder"):
            gpt_xp.load("124M")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_that_may_not_be_written(home, server):
    home.mkdir()
    home.chmod(0o500)
    with pytest.raises(DownloadError, match="set GPT_XP_HOME to another folder"):
        gpt_xp.load("124M")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path))
    assert gpt_xp_home() == tmp_path
    monkeypatch.setenv("GPT_XP_HOME", "~/models")
    assert gpt_xp_home() == Path.home() / "models"
    monkeypatch.delenv("GPT_XP_HOME")
    assert gpt_xp_home().name == "gpt-xp"


# --- removing and verifying -------------------------------------------------------------------------------------------


def test_remove(server, home):
    model = MODELS["124M"]
    assert store.remove(model) == []
    gpt_xp.load("124M")
    folder = home / "models" / "124M" / "hub"
    assert store.remove(model) == [folder]
    assert not folder.exists()
    assert store.copies(model) == []


def test_verify_throws_a_damaged_file_away(server, home):
    gpt_xp.load("124M")
    model = MODELS["124M"]
    [copy] = store.copies(model)
    files = store.verifiable(copy, model)
    assert sorted(files) == sorted(small_published.hub_files())
    assert all(store.verify(copy, model, file) for file in files)
    path = copy.folder / WEIGHTS
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a disk that rots does not change the time
    assert not store.verify(copy, model, WEIGHTS)
    assert not path.exists()
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


def test_a_manifest_cannot_lead_out_of_its_folder(server, home, tmp_path):
    gpt_xp.load("124M")
    [copy] = store.copies(MODELS["124M"])
    victim = tmp_path / "victim"
    victim.write_text("mine")
    manifest = copy.folder / "gpt-xp.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../../../victim"] = {"digest": "sha256:0", "n_bytes": 1, "mtime_ns": 1}
    manifest.write_text(json.dumps(content))
    gpt_xp.load("124M")
    assert "../../../../victim" not in store.verifiable(copy, MODELS["124M"])
    store.remove(MODELS["124M"])
    assert victim.read_text() == "mine"


def test_models_that_openai_has_not_published(server, home):
    with pytest.raises(ModelNotFoundError, match="--source hub"):
        store.pull(MODELS["distilgpt2"], "openai")
    assert not home.exists()


def test_other_pins_are_another_model(server):
    """A new version of gpt-xp with other pins does not go on with what an old one began."""
    changed = dataclasses.replace(MODELS["124M"], revision="0" * 40)
    small_published.on_hub(server, changed)
    assert store.pull(changed).is_dir()


def test_what_a_process_that_was_killed_wrote_aside_is_swept_away(server, home):
    folder = home / "models" / "124M" / "hub"
    folder.mkdir(parents=True)
    for name in (f"{WEIGHTS}.0123abcd.part", "config.json.89abcdef.part"):
        (folder / name).write_bytes(b"half")
    gpt_xp.load("124M")
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("digest", ['"foo:bar"', "5", '"shake_128:00"', "null", "[" * 200_000])
def test_an_odd_manifest_knows_nothing(server, home, digest):
    gpt_xp.load("124M")
    manifest = home / "models" / "124M" / "hub" / "gpt-xp.json"
    entry = f'{{"n_bytes": 1, "mtime_ns": 1, "digest": {digest}}}'
    manifest.write_text(f'{{"version": 1, "files": {{"config.json": {entry}}}}}')
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_in_place_of_a_manifest_does_not_hang(server, home):
    folder = home / "models" / "124M" / "hub"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "gpt-xp.json")
    os.mkfifo(folder / f"{WEIGHTS}.original.part.json")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


def test_removing_what_lies_on_another_disk(server, home, tmp_path):
    gpt_xp.load("124M")
    folder = home / "models" / "124M" / "hub"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert store.remove(MODELS["124M"]) == [folder]
    assert not folder.is_symlink()
    assert not (tmp_path / "elsewhere").exists()
