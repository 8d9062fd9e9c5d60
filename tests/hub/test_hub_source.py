"""A model from the Hub: fetched, aligned, verified, or one clear error."""

import dataclasses
import shutil

import numpy as np
import pytest
import small_published
from checkpoint_files import assert_same
from servers import status
from small_published import TENSORS, WEIGHTS, path_of

import gpt_xp
from gpt_xp.errors import CheckpointError, DownloadError
from gpt_xp.hub.published import MODELS

# --- the Hub --------------------------------------------------------------------------------------------------------


def test_a_model_by_its_name(server, home, backend):
    model = gpt_xp.load("gpt2", backend=backend)
    assert model.config == small_published.CONFIG
    assert model.tokenizer.decode(model.tokenizer.encode("the inner ear")) == "the inner ear"
    assert len(model.generate("the", max_tokens=5, ignore_eos=True).token_ids) == 5
    folder = home / "models" / "124M" / "hub"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*small_published.hub_files(), "gpt-xp.json"])
    for file in small_published.hub_files():
        assert server.sent(path_of(file)) + server.cdn.sent(path_of(file)) in (0, len(server.files[path_of(file)]))
    asked = len(server.requests) + len(server.cdn.requests)
    gpt_xp.load("124M")
    gpt_xp.load("openai-community/gpt2")
    assert len(server.requests) + len(server.cdn.requests) == asked


def test_what_is_kept_is_aligned_and_bit_equal(server, home):
    params = gpt_xp.load("124M", backend="numpy").params
    assert_same(params, TENSORS)
    for leaf in gpt_xp.tree.leaves(params):
        assert leaf.ctypes.data % 4 == 0
        base = leaf
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview | type(__import__("mmap").mmap(-1, 1)))  # mapped, not copied


def test_a_config_of_another_model_is_refused_before_the_weights_are_fetched(server):
    server.files[path_of("config.json")] = server.files[path_of("config.json")].replace(
        b'"n_layer": 2', b'"n_layer": 3'
    )
    with pytest.raises(DownloadError, match="another model"):
        gpt_xp.load("124M")
    assert not any(request.path == path_of(WEIGHTS) for request in server.requests)


def test_wrong_weights_are_not_used(server, home):
    wrong = bytearray(server.files[path_of(WEIGHTS)])
    wrong[-1] ^= 1
    right, server.files[path_of(WEIGHTS)] = server.files[path_of(WEIGHTS)], bytes(wrong)
    with pytest.raises(DownloadError, match="another file"):
        gpt_xp.load("124M")
    server.files[path_of(WEIGHTS)] = right
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


def test_an_explicit_name_never_falls_back(server):
    server.always[path_of("config.json")] = status(404)
    with pytest.raises(DownloadError, match="404"):
        gpt_xp.load("124M")


def test_a_bad_endpoint(server, monkeypatch):
    for endpoint in ("ftp://x", "huggingface.co", "https://", "http://[::1"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(DownloadError, match="HF_ENDPOINT"):
            gpt_xp.load("124M")


def test_the_token_goes_to_the_hub_alone(server, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    gpt_xp.load("124M")
    assert server.sees("Bearer hf_secret")
    assert not server.cdn.sees("hf_secret")
    assert "hf_secret" not in "".join(capfd.readouterr())


def test_a_process_that_was_killed_between_download_and_aligned_copy(server, home):
    folder = home / "models" / "124M" / "hub"
    folder.mkdir(parents=True)
    (folder / f"{WEIGHTS}.original").write_bytes(server.files[path_of(WEIGHTS)])
    gpt_xp.load("124M")
    assert server.cdn.sent(path_of(WEIGHTS)) == 0
    assert not (folder / f"{WEIGHTS}.original").exists()


def test_a_damaged_original_is_fetched_again(server, home):
    folder = home / "models" / "124M" / "hub"
    folder.mkdir(parents=True)
    (folder / f"{WEIGHTS}.original").write_bytes(server.files[path_of(WEIGHTS)][:-1])
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)


def test_a_disk_that_is_too_small_is_said_before_the_weights_come(home, server, monkeypatch):
    free = shutil.disk_usage(".")
    size = len(server.files[path_of(WEIGHTS)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=2 * size - 1))
    with pytest.raises(DownloadError, match="kB of disk space"):
        gpt_xp.load("124M")
    assert not list((home / "models" / "124M" / "hub").glob("*.part*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=2 * size))  # the file and its aligned copy
    gpt_xp.load("124M")


def test_no_room_for_the_aligned_copy(home, server, monkeypatch):
    """The disk fills up between the download and the copy: what came is kept."""
    with monkeypatch.context() as patch:
        patch.setattr("gpt_xp.hub.hub_source.align_weights", _full)
        with pytest.raises(CheckpointError, match="no space"):
            gpt_xp.load("124M")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert server.cdn.sent(path_of(WEIGHTS)) == len(server.files[path_of(WEIGHTS)])


def _full(*args: object) -> str:
    raise CheckpointError("no space")


def test_a_bad_ca_bundle_is_told_as_one(home, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    with pytest.raises(DownloadError, match="TLS CA certificate bundle"):
        gpt_xp.load("124M")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://", "::::"])
def test_a_bad_proxy_is_told_as_one(home, monkeypatch, proxy):
    monkeypatch.setattr("gpt_xp.hub.download.FIRST_WAIT", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", "http://example.invalid")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(DownloadError, match=r"(?i)proxy"):
        gpt_xp.load("124M")


def test_space_for_two_is_asked_for_also_where_the_size_is_not_pinned(server, home, monkeypatch):
    weights = gpt_xp.hub.published.Pin(None, MODELS["124M"].weights.digest)
    monkeypatch.setitem(MODELS, "124M", dataclasses.replace(MODELS["124M"], weights=weights))
    size = len(server.files[path_of(WEIGHTS)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 2 * size - 1))
    with pytest.raises(DownloadError, match="disk space"):
        gpt_xp.load("124M")
