"""What huggingface_hub has fetched is used as it is, where it is complete and right."""

import os

import pytest
from checkpoint_files import assert_same
from small_published import TENSORS, WEIGHTS, fill, path_of, snapshot

import gpt_xp
from gpt_xp.hub import find as hub
from gpt_xp.hub.published import MODELS

# --- what others have fetched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", [None, "gpt2"])
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_a_hub_cache_that_holds_the_files_is_used_as_it_is(server, home, monkeypatch, tmp_path, repo, variable):
    folder = snapshot(MODELS["124M"], repo)
    fill(folder)
    if variable != "HF_HOME":
        monkeypatch.delenv("HF_HOME")
        monkeypatch.setenv(variable, str(tmp_path / "hf" / "hub" if variable == "HF_HUB_CACHE" else tmp_path / "cache"))
        if variable == "XDG_CACHE_HOME":
            (tmp_path / "cache").mkdir()
            (tmp_path / "hf").rename(tmp_path / "cache" / "huggingface")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert not server.requests
    assert not home.exists()


def test_of_a_hub_cache_that_holds_some_files_those_are_not_fetched(server):
    fill(snapshot(MODELS["124M"]), WEIGHTS, "config.json")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert server.cdn.sent(path_of(WEIGHTS)) == 0
    assert {request.path.rpartition("/")[2] for request in server.requests} == {"vocab.json", "merges.txt"}


def test_damaged_weights_in_a_hub_cache_are_not_copied(server):
    folder = snapshot(MODELS["124M"])
    fill(folder, WEIGHTS)
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert server.cdn.sent(path_of(WEIGHTS)) == len(server.files[path_of(WEIGHTS)])


def test_gpt_xps_own_copy_comes_first(server, home):
    gpt_xp.load("124M")
    fill(snapshot(MODELS["124M"]))
    assert hub.find_model("124M") == home / "models" / "124M" / "hub"


def test_a_truncated_weight_file_in_a_hub_cache_is_not_used(server):
    folder = snapshot(MODELS["124M"])
    fill(folder)
    os.truncate(folder / WEIGHTS, 1000)
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert server.cdn.sent(path_of(WEIGHTS)) == len(server.files[path_of(WEIGHTS)])
