"""From a name to a model that runs: names, sources, the cache, what others have fetched, working offline."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import openai_files
import pytest
import small_published
from checkpoint_files import assert_same
from servers import status
from small_published import path_of

import gpt_xp
from gpt_xp.environment import gpt_xp_home
from gpt_xp.errors import CheckpointError, DownloadError, GptXpError, ModelNotFoundError
from gpt_xp.hub import find as hub
from gpt_xp.hub import store
from gpt_xp.hub.published import MODELS, find_published

TENSORS = openai_files.make_tensors()
WEIGHTS = "model.safetensors"


def snapshot(model: gpt_xp.hub.published.Published, repo: str | None = None) -> Path:
    """The folder in which huggingface_hub keeps a model."""
    name = (repo or model.repo).replace("/", "--")
    folder = Path(os.environ["HF_HOME"], "hub", f"models--{name}", "snapshots", model.revision)
    folder.mkdir(parents=True)
    return folder


def fill(folder: Path, *names: str) -> None:
    """Write files as huggingface_hub does: a blob, and a link to it."""
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for name, content in small_published.hub_files().items():
        if not names or name in names:
            (blobs / name).write_bytes(content)
            (folder / name).symlink_to(Path("..", "..", "blobs", name))


# --- names ----------------------------------------------------------------------------------------------------------

# The counts of the model cards, and of OpenAI's names.
PARAMS = {
    "124M": 124_439_808,
    "355M": 354_823_168,
    "774M": 774_030_080,
    "1558M": 1_557_611_200,
    "distilgpt2": 81_912_576,
}
ALIASES = {
    "gpt2": "124M", "117M": "124M", "openai-community/gpt2": "124M", "124m": "124M", "GPT2": "124M",
    "gpt2-medium": "355M", "345M": "355M", "openai-community/gpt2-medium": "355M",
    "gpt2-large": "774M", "openai-community/gpt2-large": "774M",
    "gpt2-xl": "1558M", "openai-community/gpt2-xl": "1558M",
    "distilbert/distilgpt2": "distilgpt2",
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_the_published_models(name):
    model = find_published(name)
    assert model is not None
    assert model.name == name
    assert model.config.n_params == PARAMS[name]
    assert model.config.n_ctx == 1024
    assert model.config.eos_token_id == 50256
    # The published files hold the float32s, a header, and for the sizes that are known the masks of each layer.
    if model.weights.n_bytes is not None:
        masks = 4 * model.config.n_layer * 1024 * 1024
        assert 0 < model.weights.n_bytes - 4 * PARAMS[name] - masks < 50_000


def test_n_params_counts_what_there_is(shakespeare):
    assert shakespeare.config.n_params == sum(leaf.size for leaf in gpt_xp.tree.leaves(shakespeare.params))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert find_published(alias) is MODELS[ALIASES[alias]]


def test_names_are_told_apart():
    names = [name.lower() for name in hub.names()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("wrong", "first"), [("gpt2-medum", "gpt2-medium"), ("124", "124M"), ("1.5B", ""), ("shakespear", "shakespeare")]
)
def test_a_wrong_name_lists_the_right_ones_closest_first(home, wrong, first):
    with pytest.raises(ModelNotFoundError) as raised:
        gpt_xp.load(wrong)
    listed = str(raised.value).rpartition("one of: ")[2].split(", ")
    assert sorted(listed) == sorted(hub.names())
    assert set(MODELS) < set(listed)
    assert listed[0].startswith(first)
    assert not home.exists()


@pytest.mark.parametrize("name", ["../124M", "124M/..", "/etc", "", "a" * 5000, "a\0b", "hub", "124M/hub"])
def test_no_name_leads_anywhere_else(server, home, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptXpError):
        gpt_xp.load(name)
    assert not home.exists()


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


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path))
    assert gpt_xp_home() == tmp_path
    monkeypatch.setenv("GPT_XP_HOME", "~/models")
    assert gpt_xp_home() == Path.home() / "models"
    monkeypatch.delenv("GPT_XP_HOME")
    assert gpt_xp_home().name == "gpt-xp"


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


# --- offline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["GPT_XP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_fetched(server, home, monkeypatch, variable):
    for yes in ("1", "true", "YES", "on"):
        monkeypatch.setenv(variable, yes)
        with pytest.raises(ModelNotFoundError, match="gpt-xp models pull 124M"):
            gpt_xp.load("124M")
    assert not server.requests
    assert not home.exists()
    monkeypatch.setenv(variable, "0")
    gpt_xp.load("124M")
    asked = len(server.requests)
    monkeypatch.setenv(variable, "1")
    gpt_xp.load("124M")
    assert len(server.requests) == asked


# --- the default ------------------------------------------------------------------------------------------------------


def test_the_default_is_124m_if_it_is_here(server, monkeypatch):
    assert hub.default_model() == "shakespeare"
    assert gpt_xp.load().config.n_layer == 6
    assert not server.requests
    gpt_xp.load("124M")
    assert hub.default_model() == "124M"
    assert gpt_xp.load().config == small_published.CONFIG
    monkeypatch.setenv("GPT_XP_MODEL", "shakespeare")
    assert gpt_xp.load().config.n_layer == 6
    monkeypatch.setenv("GPT_XP_MODEL", "no-such-model")
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        gpt_xp.load()


def test_a_directory_comes_before_a_name(server, tmp_path, monkeypatch, shakespeare):
    shakespeare.save(tmp_path / "124M")
    monkeypatch.chdir(tmp_path)
    assert gpt_xp.load("124M").config == shakespeare.config
    assert not server.requests


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


# --- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["GPT_XP_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["~no-such-user/x", "x" * 300, "a/" * 3000, "/dev/null/x", "ä\n*?["])
def test_a_cache_folder_that_cannot_be_does_not_stop_the_bundled_model(home, monkeypatch, tmp_path, variable, value):
    monkeypatch.chdir(tmp_path)
    if variable != "GPT_XP_HOME":
        monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, value)
    assert hub.find_model() == hub.BUNDLED / "shakespeare"
    assert store.copies(MODELS["124M"]) == []


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


def test_a_truncated_weight_file_in_a_hub_cache_is_not_used(server):
    folder = snapshot(MODELS["124M"])
    fill(folder)
    os.truncate(folder / WEIGHTS, 1000)
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert server.cdn.sent(path_of(WEIGHTS)) == len(server.files[path_of(WEIGHTS)])


def test_space_for_two_is_asked_for_also_where_the_size_is_not_pinned(server, home, monkeypatch):
    weights = gpt_xp.hub.published.Pin(None, MODELS["124M"].weights.digest)
    monkeypatch.setitem(MODELS, "124M", dataclasses.replace(MODELS["124M"], weights=weights))
    size = len(server.files[path_of(WEIGHTS)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 2 * size - 1))
    with pytest.raises(DownloadError, match="disk space"):
        gpt_xp.load("124M")


def test_removing_what_lies_on_another_disk(server, home, tmp_path):
    gpt_xp.load("124M")
    folder = home / "models" / "124M" / "hub"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert store.remove(MODELS["124M"]) == [folder]
    assert not folder.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("encoder.json",)])
def test_openais_vocabulary_alone_is_a_tokenizer(call, home, tmp_path, names):
    for name in names:
        shutil.copy(small_published.GOLDEN / name, tmp_path / name)
    if len(names) == 2:
        expected = gpt_xp.Tokenizer.from_directory(small_published.GOLDEN).encode("the inner")
        done = call("tokens", "-m", str(tmp_path), "--json", "the inner")
        assert [each["id"] for each in json.loads(done.out)["tokens"]] == expected
    else:
        assert "has encoder.json but not vocab.bpe" in call("tokens", "-m", str(tmp_path), "the").err
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        gpt_xp.load(tmp_path)


def test_a_step_of_gpt_2_simple_without_hparams_lacks_those_alone(home, tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(small_published.GOLDEN / name, tmp_path / name)
    shutil.copy(small_published.GOLDEN / "model.ckpt.index", tmp_path / "model-1000.index")
    with pytest.raises(CheckpointError, match=r"has model-1000\.index, .* but not hparams\.json; copy all the files"):
        gpt_xp.load(tmp_path)


@pytest.mark.parametrize("missing", ["hparams.json", "model.ckpt.index"])
def test_an_incomplete_checkpoint_of_openais_is_told_as_one(home, tmp_path, missing):
    shutil.copytree(small_published.GOLDEN, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"but not .*\b{missing}; copy all the files"):
        gpt_xp.load(tmp_path / "model")
