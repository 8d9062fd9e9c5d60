"""What picoGPT's readers look for."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import naive_gpt2
import numpy as np
import openai_files
import pytest
import small_published
from checkpoint_files import TINY, assert_same, leaves, make_tensors, nested
from comparison import TOLERANCE, assert_values
from servers import BucketServer, HubServer, reset, status

import gpt_xp
from gpt_xp.checkpoint import checkpoint
from gpt_xp.errors import CheckpointError, DownloadError, ModelNotFoundError, SettingError
from gpt_xp.hub import find as hub
from gpt_xp.hub import store
from gpt_xp.hub.published import MODELS, OPENAI_FILES, OPENAI_WEIGHTS
from gpt_xp.installation import install_command

TENSORS = openai_files.make_tensors()
GOLDEN = small_published.GOLDEN


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """picoGPT's folder of models, empty."""
    return tmp_path / "models"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """OpenAI's bucket with a small 124M."""
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("gpt_xp.hub.download.FIRST_WAIT", 0.001)
    with BucketServer() as server:
        small_published.install(monkeypatch, "124M", bucket=server.url)
        small_published.in_bucket(server, "124M")
        yield server


def path_of(file: str) -> str:
    return f"/gpt-2/models/124M/{file}"


# --- the call ---------------------------------------------------------------------------------------------------------


def test_picogpts_call_reads_an_existing_folder(tensorflow, models):
    shutil.copytree(GOLDEN, models / "124M")
    encoder, hparams, params = gpt_xp.load_encoder_hparams_and_params("124M", str(models))
    assert hparams == {"n_vocab": 263, "n_ctx": 11, "n_embd": 15, "n_head": 3, "n_layer": 2}
    assert_same(params, TENSORS)
    ids = encoder.encode("the inner ear")
    assert encoder.decode(ids) == "the inner ear"
    assert encoder.decoder[ids[0]] == "the"
    for leaf in leaves(params):
        leaf[...] = 0  # one's own, as picoGPT's are, and not a file that others read
    again = gpt_xp.load_encoder_hparams_and_params("124M", models)[2]
    assert_same(again, TENSORS)


def test_functions_that_are_called_as_picogpts_run_on_the_result(tensorflow, models):
    shutil.copytree(GOLDEN, models / "124M")
    encoder, hparams, params = gpt_xp.load_encoder_hparams_and_params("124M", models)
    ids = encoder.encode("in the ear")
    logits = naive_gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    assert_values(gpt_xp.load(models / "124M", backend="numpy").logits(ids), logits, TOLERANCE["logits", "float32"])


def test_picogpts_call_downloads_into_the_folder(tensorflow, models, bucket):
    assert_same(gpt_xp.load_encoder_hparams_and_params("124M", models)[2], TENSORS)
    here = {path.name for path in (models / "124M").iterdir()}
    assert here == {*OPENAI_FILES, "model.safetensors", "config.json", "gpt-xp.json"}
    for name, content in small_published.openai_layout().items():
        assert (models / "124M" / name).read_bytes() == content
        assert bucket.sent(path_of(name)) == len(content)
    assert_same(gpt_xp.load_encoder_hparams_and_params("124M", models)[2], TENSORS)
    assert len(bucket.requests) == len(OPENAI_FILES)
    assert len(tensorflow.opened) == 1


def test_a_download_into_the_folder_that_broke_off_goes_on(tensorflow, models, bucket, monkeypatch):
    monkeypatch.setattr("gpt_xp.hub.download.TRIES", 1)
    bucket.faults[path_of(OPENAI_WEIGHTS)] = [reset(10007)]
    with pytest.raises(DownloadError, match="10007 bytes are kept"):
        gpt_xp.load_encoder_hparams_and_params("124M", models)
    assert_same(gpt_xp.load_encoder_hparams_and_params("124M", models)[2], TENSORS)
    assert bucket.requests[-2].start == 10007  # the index comes last
    assert len(bucket.requests) == len(OPENAI_FILES) + 1


def test_what_picogpt_left_when_it_was_stopped_is_not_taken_for_a_model(tensorflow, models, bucket):
    """It writes under the final name at once; the index, without which nothing can be read, comes after the weights."""
    folder = models / "124M"
    folder.mkdir(parents=True)
    for name, content in small_published.openai_layout().items():
        if name in ("checkpoint", "encoder.json", "hparams.json"):
            (folder / name).write_bytes(content)
    (folder / OPENAI_WEIGHTS).write_bytes(small_published.openai_layout()[OPENAI_WEIGHTS][:5003])
    assert_same(gpt_xp.load_encoder_hparams_and_params("124M", models)[2], TENSORS)
    assert (folder / OPENAI_WEIGHTS).read_bytes() == small_published.openai_layout()[OPENAI_WEIGHTS]


@pytest.mark.parametrize("name", ["124m", "gpt2", "117M"])
def test_an_alias_finds_the_folder_and_nothing_is_fetched_over_it(tensorflow, models, bucket, name):
    shutil.copytree(GOLDEN, models / "124M")
    mine = models / "124M" / "model.ckpt.data-00000-of-00001"
    mine.write_bytes(b"fine-tuned")
    assert_same(gpt_xp.load_encoder_hparams_and_params(name, models)[2], TENSORS)
    assert mine.read_bytes() == b"fine-tuned"
    assert not bucket.requests


def test_nothing_is_fetched_over_an_index_without_the_rest(tensorflow, models, bucket):
    (models / "124M").mkdir(parents=True)
    (models / "124M" / "model.ckpt.index").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"but not hparams\.json"):
        gpt_xp.load_encoder_hparams_and_params("124M", models)
    assert (models / "124M" / "model.ckpt.index").read_bytes() == b"mine"
    assert not bucket.requests


@pytest.mark.parametrize("models_dir", ["a\0b", "x" * 5000])
def test_a_folder_that_cannot_be_is_one_error(tensorflow, bucket, models_dir):
    with pytest.raises((DownloadError, ModelNotFoundError)):
        gpt_xp.load_encoder_hparams_and_params("124M", models_dir)


def test_a_wrong_size_lists_the_right_ones(models):
    with pytest.raises(ModelNotFoundError, match="no other of that name: take 124M, "):
        gpt_xp.load_encoder_hparams_and_params("124", models)
    with pytest.raises(ModelNotFoundError, match="take shakespeare, "):
        gpt_xp.load_encoder_hparams_and_params("shakespear", models)
    assert not models.exists()


def test_the_bundled_model_is_found_and_is_float32(models):
    """It is stored in float16, in which the article's own functions give NaN."""
    encoder, hparams, params = gpt_xp.load_encoder_hparams_and_params("shakespeare", models)
    assert {str(leaf.dtype) for leaf in leaves(params)} == {"float32"}
    assert not models.exists()
    ids = encoder.encode("O Romeo, Romeo! wherefore art thou")
    logits = naive_gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    assert_values(gpt_xp.load("shakespeare", backend="numpy").logits(ids), logits, TOLERANCE["logits", "float32"])


def test_a_folder_of_the_bundled_models_name_comes_first(tensorflow, models):
    shutil.copytree(GOLDEN, models / "shakespeare")
    assert_same(gpt_xp.load_encoder_hparams_and_params("shakespeare", models)[2], TENSORS)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_params_are_float32_however_they_are_stored(models, dtype, shakespeare):
    params = gpt_xp.tree.tree_map(lambda leaf: np.asarray(leaf, "float32"), shakespeare.params)
    if dtype == "int8":
        stored, tolerance = gpt_xp.quantize(params, "int8"), 1 / 127
    else:
        stored, tolerance = gpt_xp.tree.tree_map(lambda leaf: leaf.astype(dtype), params), 2**-11
    checkpoint.save(models / "mine", stored, shakespeare.config, shakespeare.tokenizer)
    found = gpt_xp.load_encoder_hparams_and_params("mine", models)[2]
    for ours, expected in zip(leaves(found), leaves(params), strict=True):
        assert ours.dtype == np.float32
        assert ours.flags.writeable
        assert_values(ours, expected, tolerance)


# --- without TensorFlow -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_without_tensorflow_the_hubs_files_are_fetched(no_tensorflow, models, server):
    expected = gpt_xp.load("124M", backend="numpy").params
    n_requests = len(server.requests)
    for _ in range(2):  # the copy that is here is used, and nothing is fetched twice
        encoder, hparams, params = gpt_xp.load_encoder_hparams_and_params("124M", models)
        for ours, right in zip(leaves(params), leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, right)
        assert encoder.decode(encoder.encode("the")) == "the"
        assert hparams["n_vocab"] == MODELS["124M"].config.n_vocab
    assert len(server.requests) == n_requests
    assert not models.exists()


def test_without_tensorflow_the_hubs_files_come_into_the_folder_even_if_they_break_off(
    no_tensorflow, models, server, monkeypatch
):
    monkeypatch.setattr("gpt_xp.hub.download.TRIES", 1)
    server.faults[small_published.path_of("model.safetensors")] = [status(404)]
    with pytest.raises(DownloadError, match="404"):
        gpt_xp.load_encoder_hparams_and_params("124M", models)
    assert (models / "124M" / "config.json").exists()
    params = gpt_xp.load_encoder_hparams_and_params("124M", models)[2]
    n_requests = len(server.requests)
    again = gpt_xp.load_encoder_hparams_and_params("124M", models)[2]
    for ours, right in zip(leaves(again), leaves(params), strict=True):
        np.testing.assert_array_equal(ours, right)
    assert len(server.requests) == n_requests


def test_a_model_that_openai_has_not_comes_from_the_hub(tensorflow, models, home, monkeypatch):
    small_published.install(monkeypatch, "distilgpt2")
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        small_published.on_hub(server, MODELS["distilgpt2"])
        hparams = gpt_xp.load_encoder_hparams_and_params("distilgpt2", models)[1]
    assert hparams["n_layer"] == MODELS["distilgpt2"].config.n_layer
    assert (models / "distilgpt2" / "model.safetensors").exists()


def test_offline_nothing_is_fetched(tensorflow, models, bucket, monkeypatch):
    monkeypatch.setenv("GPT_XP_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="offline"):
        gpt_xp.load_encoder_hparams_and_params("124M", models)
    assert not bucket.requests
    assert not models.exists()


# --- the bucket as a source -------------------------------------------------------------------------------------------


def test_the_bucket_is_converted_and_tensorflow_not_needed_again(tensorflow, bucket, tmp_path):
    folder = store.pull(MODELS["124M"], "openai")
    assert folder == tmp_path / "home" / "models" / "124M" / "openai"
    assert hub.find_model("124M") == folder
    assert_same(gpt_xp.load("124M", backend="numpy").params, TENSORS)
    assert len(tensorflow.opened) == 1
    assert len(bucket.requests) == len(OPENAI_FILES)
    [copy] = store.copies(MODELS["124M"])
    assert copy.source == "openai"
    assert sorted(store.verifiable(copy, MODELS["124M"])) == sorted([*OPENAI_FILES, "model.safetensors", "config.json"])
    assert all(store.verify(copy, MODELS["124M"], file) for file in store.verifiable(copy, MODELS["124M"]))


def test_without_tensorflow_nothing_is_fetched_from_the_bucket(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=re.escape(install_command("tensorflow"))):
        store.pull(MODELS["124M"], "openai")
    assert not bucket.requests
    assert not (tmp_path / "home").exists()


def test_wrong_bytes_from_the_bucket_are_not_used(tensorflow, bucket, monkeypatch):
    right = bucket.files[path_of(OPENAI_WEIGHTS)]
    bucket.files[path_of(OPENAI_WEIGHTS)] = right[:-1] + b"\0"
    with pytest.raises(DownloadError, match="another file"):
        store.pull(MODELS["124M"], "openai")
    bucket.files[path_of(OPENAI_WEIGHTS)] = right
    assert_same(gpt_xp.load(store.pull(MODELS["124M"], "openai"), backend="numpy").params, TENSORS)


def test_another_model_in_the_bucket_is_refused_before_its_weights_are_fetched(tensorflow, bucket):
    hparams = bucket.files[path_of("hparams.json")]
    bucket.files[path_of("hparams.json")] = hparams.replace(b'"n_layer": 2', b'"n_layer": 3')
    with pytest.raises(DownloadError, match="another model"):
        store.pull(MODELS["124M"], "openai")
    assert bucket.sent(path_of(OPENAI_WEIGHTS)) == 0


def test_a_missing_file_in_the_bucket(tensorflow, bucket):
    bucket.always[path_of("vocab.bpe")] = status(404)
    with pytest.raises(DownloadError, match="404"):
        store.pull(MODELS["124M"], "openai")


def test_a_damaged_conversion_is_made_again(tensorflow, bucket):
    weights = store.pull(MODELS["124M"], "openai") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert store.copies(MODELS["124M"]) == []
    assert_same(gpt_xp.load(store.pull(MODELS["124M"], "openai"), backend="numpy").params, TENSORS)
    assert len(bucket.requests) == len(OPENAI_FILES)
    assert len(tensorflow.opened) == 2


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # warnings of TensorFlow about itself
def test_both_sources_give_bit_equal_params(bucket, monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        small_published.on_hub(server, MODELS["124M"])
        params = [gpt_xp.load(store.pull(MODELS["124M"], source), backend="numpy").params for source in store.SOURCES]
    for each in params:
        assert_same(each, TENSORS)


# --- shape_tree -------------------------------------------------------------------------------------------------------


def test_the_shapes_of_a_model():
    linear = {"c_attn": {"w": [3, 9], "b": [9]}, "c_proj": {"w": [3, 3], "b": [3]}}
    norm = {"g": [3], "b": [3]}
    mlp = {"c_fc": {"w": [3, 12], "b": [12]}, "c_proj": {"w": [12, 3], "b": [3]}}
    blocks = [{"ln_1": norm, "attn": linear, "ln_2": norm, "mlp": mlp}]
    tree = gpt_xp.shape_tree(nested(make_tensors(TINY)))
    assert tree == {"wte": [7, 3], "wpe": [5, 3], "blocks": blocks, "ln_f": norm}


def test_arrays_of_any_library_and_of_any_rank():
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    assert gpt_xp.shape_tree((strict.ones((2, 0, 5)), {"a": np.float32(1)})) == [[2, 0, 5], {"a": []}]
    assert gpt_xp.shape_tree({}) == {}


@pytest.mark.parametrize("leaf", [3, None, "abc" * 100])
def test_what_is_no_array_is_named(leaf):
    with pytest.raises(SettingError, match="a tree of arrays was expected") as caught:
        gpt_xp.shape_tree({"blocks": [leaf]})
    assert len(str(caught.value)) < 200
