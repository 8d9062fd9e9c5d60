"""Checkpoints: what transformers writes is read bit for bit, what we write it reads, and damage is refused."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import stat
import sys
import tracemalloc

import numpy as np
import pytest
from checkpoint_files import (
    CODES,
    CONFIG,
    PUBLISHED_HEADER,
    TINY,
    assert_same,
    config_entries,
    file_bytes,
    header_of,
    leaves,
    make_tensors,
    nested,
    shapes,
    write_checkpoint,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from gpt_xp.checkpoint import checkpoint, safetensors_file
from gpt_xp.checkpoint.config_json import config_of as config_of_carried
from gpt_xp.checkpoint.config_json import read_carried, read_config
from gpt_xp.checkpoint.safetensors_file import open_safetensors, write_safetensors
from gpt_xp.checkpoint.weights import align_weights, read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    GptXpWarning,
    ModelNotFoundError,
)

WEIGHTS = "model.safetensors"

UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def prefixed(tensors):
    return {f"transformer.{name}": array for name, array in tensors.items()}


# --- reading: what is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [dict, prefixed])
def test_names_are_known_with_and_without_their_prefix(tmp_path, name):
    tensors = make_tensors(CONFIG)
    write_checkpoint(tmp_path, name(tensors))
    assert read_config(tmp_path) == CONFIG
    assert_same(read_params(str(tmp_path), CONFIG), tensors, np.float32)


@pytest.mark.parametrize("stored", ["float16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float16", "float32", "float64", None])
@pytest.mark.parametrize("header_length", [None, PUBLISHED_HEADER])
def test_each_dtype_is_read_as_each(tmp_path, stored, wanted, header_length):
    tensors = make_tensors(CONFIG, stored)
    write_checkpoint(tmp_path, tensors, header_length=header_length)
    params = read_params(tmp_path, CONFIG, wanted)
    assert_same(params, tensors, wanted or stored)
    for array in leaves(params):
        assert array.flags.aligned
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        if header_length or (wanted or stored) != stored:
            assert array.ctypes.data % 64 == 0  # read, and then the alignment is ours to choose


@pytest.mark.parametrize("header_length", [None, PUBLISHED_HEADER])
@pytest.mark.parametrize(("wanted", "given_dtype"), [(None, "float32"), ("float32", "float32"), ("float64", "float64")])
def test_bfloat16_is_widened(tmp_path, header_length, wanted, given_dtype):
    tensors = make_tensors(CONFIG)
    upper = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors.items()}
    widened = {name: (array.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, array in tensors.items()}
    write_checkpoint(tmp_path, upper, header_length=header_length)
    assert_same(read_params(tmp_path, CONFIG, wanted), widened, given_dtype)


def test_aligned_tensors_are_mapped_and_misaligned_ones_are_not(tmp_path):
    tensors = make_tensors(CONFIG)
    for directory, header_length, mapped in [("aligned", None, True), ("published", PUBLISHED_HEADER, False)]:
        path = write_checkpoint(tmp_path / directory, tensors, header_length=header_length) / WEIGHTS
        params = read_params(path.parent, CONFIG)
        last = 4 * CONFIG.n_embd  # bytes of ln_f.bias, which ends the file
        with path.open("rb+") as file:
            file.seek(-last, os.SEEK_END)
            file.write(b"\0" * last)
        assert (params["ln_f"]["b"] == 0).all() == mapped  # a map shows what is written to its file


def test_a_misaligned_file_is_in_memory_once(tmp_path):
    config = GPT2Config(n_vocab=3001, n_ctx=7, n_embd=96, n_head=3, n_layer=1)
    tensors = make_tensors(config)
    write_checkpoint(tmp_path, tensors, header_length=PUBLISHED_HEADER)
    n_bytes = sum(array.nbytes for array in tensors.values())
    tracemalloc.start()
    params = read_params(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_same(params, tensors)
    assert n_bytes <= peak < 1.2 * n_bytes


def test_constants_and_an_equal_head_are_ignored(tmp_path):
    tensors = make_tensors(CONFIG)
    mask = np.ones((1, 1, 37, 37), np.float32)
    extra = {"lm_head.weight": tensors["wte.weight"], "transformer.h.1.attn.masked_bias": np.ones((), np.float32)}
    write_checkpoint(tmp_path, prefixed(tensors) | extra | {"transformer.h.0.attn.bias": mask.astype(bool)})
    assert_same(read_params(tmp_path, CONFIG), tensors)
    write_checkpoint(tmp_path, tensors | {"h.0.attn.bias": mask, "h.1.attn.bias": mask})
    assert_same(read_params(tmp_path, CONFIG), tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", [0, -1])
def test_a_head_of_its_own_is_refused(tmp_path, tied, place):
    tensors = make_tensors(CONFIG)
    head = tensors["wte.weight"].copy()
    head[place, place] += 1
    write_checkpoint(tmp_path, prefixed(tensors) | {"lm_head.weight": head})
    config_of(tmp_path, tie_word_embeddings=tied)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* differs from wte\.weight.*take a checkpoint with"):
        read_params(tmp_path, CONFIG)
    write_checkpoint(tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"].reshape(39, 101)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* differs from wte\.weight"):
        read_params(tmp_path, CONFIG)


def only_the_head(tensors):
    """What safetensors.torch.save_model leaves: of two names of one matrix the first."""
    return {{"wte.weight": "lm_head.weight"}.get(name, f"transformer.{name}"): tensors[name] for name in tensors}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("header_length", [None, PUBLISHED_HEADER])
def test_the_head_alone_is_the_embedding_too(tmp_path, dtype, header_length):
    tensors = make_tensors(CONFIG, dtype)
    write_checkpoint(tmp_path, only_the_head(tensors), header_length=header_length)
    assert_same(read_params(tmp_path, CONFIG, None), tensors)
    config_of(tmp_path, tie_word_embeddings=True)
    assert_same(read_params(tmp_path, CONFIG), tensors, np.float32)


def test_untied_matrices_that_are_equal_are_one(tmp_path):
    tensors = make_tensors(CONFIG)
    write_checkpoint(tmp_path, prefixed(tensors) | {"lm_head.weight": tensors["wte.weight"]})
    config = config_of(tmp_path, tie_word_embeddings=False)
    assert_same(read_params(tmp_path, config), tensors)


@pytest.mark.parametrize(("names", "missing"), [(prefixed, "lm_head.weight"), (only_the_head, "wte.weight")])
def test_an_untied_matrix_that_is_missing_is_refused(tmp_path, names, missing):
    """transformers fills it with random numbers."""
    write_checkpoint(tmp_path, names(make_tensors(CONFIG)))
    config = config_of(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=rf"not {missing}, .*tie_word_embeddings is false.*set it to true"):
        read_params(tmp_path, config)


def test_equal_matrices_are_compared_in_little_memory(tmp_path):
    config = GPT2Config(n_vocab=3001, n_ctx=7, n_embd=96, n_head=3, n_layer=1)
    tensors = make_tensors(config)
    write_checkpoint(tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"]}, config)
    tracemalloc.start()
    params = read_params(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_same(params, tensors)
    assert peak < tensors["wte.weight"].nbytes / 2
    for place in (0, 1500, -1):  # the whole matrix is compared
        head = tensors["wte.weight"].copy()
        head[place] += 1
        write_checkpoint(tmp_path, tensors | {"lm_head.weight": head}, config)
        with pytest.raises(CheckpointError, match=r"differs from wte\.weight"):
            read_params(tmp_path, config)


@pytest.mark.parametrize(
    "heads",
    [
        {"v_head.summary.weight": (1, 39), "v_head.summary.bias": (1,)},  # trl
        {"score.weight": (2, 39)},
        {"classifier.weight": (2, 39), "lm_head.weight": None},
        {f"heads.{i}.weight": (3, 39) for i in range(9)},
    ],
    ids=["v_head", "score", "and a tied head", "many"],
)
@pytest.mark.parametrize("names", [dict, prefixed])
def test_heads_for_other_tasks_are_left_out_with_a_warning(tmp_path, heads, names):
    tensors = make_tensors(CONFIG)
    extra = {
        name: tensors["wte.weight"] if shape is None else np.ones(shape, np.float32) for name, shape in heads.items()
    }
    write_checkpoint(tmp_path, extra | names(tensors))
    with pytest.warns(GptXpWarning) as caught:
        params = read_params(tmp_path, CONFIG)
    assert_same(params, tensors)
    [warning] = caught
    message = str(warning.message)
    assert message.startswith(f"{tmp_path} is loaded without {next(iter(heads))}")
    assert "lm_head" not in message
    assert "\n" not in message
    assert ("and 3 more" in message) == (len(heads) == 9)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.attn.rotary", (39,)),
        ("h.1.crossattention.c_attn.weight", (39, 78)),
        ("transformer.embed_norm.weight", (39,)),  # inside the transformer
        ("wte.weight_lora", (39,)),
        ("lm_head.bias", (101,)),  # added to the logits
    ],
)
@pytest.mark.parametrize("with_a_head", [False, True])
def test_parts_that_change_what_is_computed_are_refused(tmp_path, name, shape, with_a_head):
    extra = {name: np.ones(shape, np.float32)}
    if with_a_head:
        extra["score.weight"] = np.ones((2, 39), np.float32)
    write_checkpoint(tmp_path, prefixed(make_tensors(CONFIG)) | extra)
    with pytest.raises(CheckpointError, match=rf"'{name.removeprefix('transformer.')}' is no tensor of this GPT-2"):
        read_params(tmp_path, CONFIG)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("names", [dict, prefixed, only_the_head])
def test_a_prefix_that_all_names_share_is_told(tmp_path, prefix, names):
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 37, 37), bool)}
    tensors = names(make_tensors(CONFIG)) | mask
    write_checkpoint(tmp_path, {prefix + name: array for name, array in tensors.items()})
    with pytest.raises(CheckpointError) as caught:
        read_params(tmp_path, CONFIG)
    message = str(caught.value)
    assert f"begin with '{prefix}', " in message
    assert f"model.{prefix}save_pretrained" in message
    assert "\n" not in message


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    tensors = make_tensors(CONFIG)
    tensors["h.1.mlp.c_fc.bias"][3] = 1e5
    tensors["h.1.ln_1.bias"][:2] = np.inf, np.nan  # these stay what they are
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias .* too large for float16"):
        read_params(tmp_path, CONFIG, "float16")
    tensors["h.1.mlp.c_fc.bias"][3] = 1e-30
    write_checkpoint(tmp_path, tensors)
    bias = read_params(tmp_path, CONFIG, "float16")["blocks"][1]["ln_1"]["b"]
    assert np.isinf(bias[0])
    assert np.isnan(bias[1])


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float33"])
def test_an_unknown_dtype_is_refused(tmp_path, dtype):
    with pytest.raises(BackendError, match=f"'{dtype}'.*float16, float32, float64"):
        read_params(tmp_path, CONFIG, dtype)


# --- reading: shards ------------------------------------------------------------------------------------------------


def write_shards(directory, parts, weight_map=None):
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for shard, tensors in zip(names, parts, strict=True):
        (directory / shard).write_bytes(file_bytes(tensors))
    found = {name: shard for shard, tensors in zip(names, parts, strict=True) for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": found if weight_map is None else weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return names, found


@pytest.fixture
def parts():
    tensors = list(prefixed(make_tensors(CONFIG)).items())
    return [dict(tensors[:5]), dict(tensors[5:20]), dict(tensors[20:])]


def test_shards_are_read_and_one_whole_file_goes_first(tmp_path, parts):
    write_shards(tmp_path, parts)
    assert_same(read_params(tmp_path, CONFIG), make_tensors(CONFIG))
    whole = make_tensors(CONFIG, seed=1)
    write_checkpoint(tmp_path, whole)  # as transformers chooses
    assert_same(read_params(tmp_path, CONFIG), whole)


def test_a_missing_shard_is_named(tmp_path, parts):
    names, _ = write_shards(tmp_path, parts)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {names[1]}"):
        read_params(tmp_path, CONFIG)


def test_a_tensor_absent_from_its_shard_is_named(tmp_path, parts):
    names, weight_map = write_shards(tmp_path, parts)
    write_shards(tmp_path, parts, weight_map | {"transformer.ln_f.bias": names[0]})
    with pytest.raises(CheckpointError, match=rf"places 'transformer\.ln_f\.bias' in {names[0]}, where it is not"):
        read_params(tmp_path, CONFIG)


def test_an_index_may_list_what_old_versions_saved_and_this_one_did_not(tmp_path, parts):
    """The head that is tied, and the masks."""
    names, weight_map = write_shards(tmp_path, parts)
    others = {"lm_head.weight": names[2], "transformer.h.0.attn.bias": names[0], "h.1.attn.masked_bias": names[1]}
    write_shards(tmp_path, parts, weight_map | others)
    assert_same(read_params(tmp_path, CONFIG), make_tensors(CONFIG))


def test_the_head_alone_may_be_in_a_shard(tmp_path, parts):
    parts[2]["lm_head.weight"] = parts[0].pop("transformer.wte.weight")
    names, weight_map = write_shards(tmp_path, parts)
    assert_same(read_params(tmp_path, CONFIG), make_tensors(CONFIG))
    write_shards(tmp_path, parts, weight_map | {"transformer.wte.weight": names[0]})
    assert_same(read_params(tmp_path, CONFIG), make_tensors(CONFIG))
    del parts[2]["lm_head.weight"]
    write_shards(tmp_path, parts, weight_map)
    with pytest.raises(CheckpointError, match=r"wte\.weight is missing"):
        read_params(tmp_path, CONFIG)


def test_a_tensor_in_two_shards_is_refused(tmp_path, parts):
    parts[0]["ln_f.bias"] = parts[2]["transformer.ln_f.bias"]
    write_shards(tmp_path, parts)
    with pytest.raises(CheckpointError, match=r"'ln_f\.bias' is in .*00001.* and again in .*00003"):
        read_params(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/secret.safetensors", "..\\a.safetensors", "x.bin", 5, None]
)
def test_an_index_leads_nowhere_else(tmp_path, parts, place):
    directory = tmp_path / "inside"
    directory.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(file_bytes(parts[0]))
    _, weight_map = write_shards(directory, parts)
    write_shards(directory, parts, weight_map | dict.fromkeys(parts[0], place))
    with pytest.raises(CheckpointError, match="plain name"):
        read_params(directory, CONFIG)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "malformed JSON"),
        ("{", "malformed JSON"),
        ("[]", "no JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {}}', "2 layers, but there are only 0 tensors"),
        ('{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}', "'a' is there 2 times"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path, text, complaint):
    (tmp_path / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        read_params(tmp_path, CONFIG)


# --- reading: tensors that do not fit -------------------------------------------------------------------------------


def test_all_misfits_are_named_in_one_message(tmp_path):
    tensors = make_tensors(CONFIG)
    del tensors["wpe.weight"]
    tensors["score.weight"] = np.ones((2, 39), np.float32)
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.copy()
    tensors["h.1.ln_1.bias"] = np.ones(39, np.int32)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        read_params(tmp_path, CONFIG)
    message = str(caught.value)
    assert "wpe.weight is missing" in message
    assert "'score.weight' is no tensor of this GPT-2" in message
    assert "h.0.attn.c_attn.weight is [117, 39] instead of [39, 117]" in message
    assert "h.1.ln_1.bias is I32 instead of one of F16, F32, F64, BF16" in message
    assert "more" not in message
    assert "\n" not in message


def test_many_misfits_are_counted(tmp_path):
    tensors = make_tensors(CONFIG)
    write_checkpoint(tmp_path, tensors)
    other = GPT2Config(n_vocab=101, n_ctx=37, n_embd=42, n_head=3, n_layer=2)
    with pytest.raises(CheckpointError, match=r"wte\.weight is \[101, 39\] instead of \[101, 42\].* 22 more\."):
        read_params(tmp_path, other)


def test_too_many_and_too_few_layers_are_refused(tmp_path):
    write_checkpoint(tmp_path, make_tensors(CONFIG))
    sizes = {"n_vocab": 101, "n_ctx": 37, "n_embd": 39, "n_head": 3}
    with pytest.raises(CheckpointError, match=r"h\.2\.ln_1\.weight is missing.* 6 more"):
        read_params(tmp_path, GPT2Config(**sizes, n_layer=3))
    with pytest.raises(CheckpointError, match=r"'h\.1\.ln_1\.weight' is no tensor.* 6 more"):
        read_params(tmp_path, GPT2Config(**sizes, n_layer=1))
    with pytest.raises(CheckpointError, match="2000000000 layers, but there are only 28 tensors"):  # at once
        read_params(tmp_path, GPT2Config(**sizes, n_layer=2_000_000_000))


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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 548105171\n"


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


# --- reading: config.json -------------------------------------------------------------------------------------------


def config_of(directory, **changes):
    (directory / "config.json").write_text(json.dumps(config_entries(CONFIG, **changes)))
    return read_config(directory)


def test_the_published_config_is_read(tmp_path):
    published = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
    (tmp_path / "config.json").write_text(published)
    assert read_config(tmp_path) == GPT2Config(50257, 1024, 768, 12, 12, 50256, 50256)


def test_n_positions_counts_and_n_ctx_is_its_old_name(tmp_path):
    assert config_of(tmp_path, n_positions=41, n_ctx=37).n_ctx == 41
    entries = config_entries(CONFIG)
    del entries["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_config(tmp_path).n_ctx == 37


@pytest.mark.parametrize(
    ("entry", "eos"), [(5, 5), (0, 0), (None, None), ([7], 7), ([8, 3], (8, 3)), ([], None), (101, None), (-1, None)]
)
def test_eos_token_id(tmp_path, entry, eos):
    assert config_of(tmp_path, eos_token_id=entry).eos_token_id == eos


def test_ids_beyond_the_vocabulary_end_nothing(tmp_path):
    assert config_of(tmp_path, eos_token_id=[101, 7, 9]).eos_token_id == (7, 9)
    assert config_of(tmp_path, eos_token_id=[101, 7]).eos_token_id == 7


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_an_absent_role_is_left_to_the_tokenizer(tmp_path, key):
    entries = config_entries(CONFIG)
    del entries[key]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert getattr(read_config(tmp_path), key) is None


def test_generation_config_comes_before_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_entries(CONFIG)))
    for stated, eos, bos in (
        ({"eos_token_id": [7, 11]}, (7, 11), 3),
        ({"eos_token_id": None, "bos_token_id": 13}, 5, 13),
        ({}, 5, 3),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
        config = read_config(tmp_path)
        assert (config.eos_token_id, config.bos_token_id) == (eos, bos)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is"):
        read_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "same",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": None},
        {"n_inner": 156},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        {"reorder_and_upcast_attn": True},
        {"architectures": ["GPT2Model"]},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},  # the weights then say whether it is GPT-2
    ],
)
def test_the_same_mathematics_in_other_words_is_accepted(tmp_path, same):
    assert config_of(tmp_path, **same) == CONFIG


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "gpt_neo"},
        {"model_type": None},
        {"model_type": ["gpt2"]},
        {"activation_function": "gelu"},
        {"activation_function": ["gelu_new"]},
        {"layer_norm_epsilon": 1e-6},
        {"layer_norm_epsilon": "1e-05"},
        {"layer_norm_epsilon": float("nan")},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": 1},
        {"add_cross_attention": True},
        {"tie_word_embeddings": None},
        {"n_inner": 155},
        {"n_inner": 156.0},
        {"vocab_size": "101"},
        {"vocab_size": 101.0},
        {"vocab_size": True},
        {"n_positions": None},
        {"n_positions": 0},
        {"n_embd": 10**1000},
        {"n_head": -3},
        {"n_head": 2},
        {"n_layer": [2]},
        {"eos_token_id": "<|endoftext|>"},
        {"eos_token_id": [5, "a"]},
        {"eos_token_id": True},
    ],
    ids=lambda other: f"{other!s:.40}",
)
def test_another_model_is_refused(tmp_path, other):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **other)
    message = str(caught.value)
    assert "config.json" in message
    assert next(iter(other)) in message
    assert len(message) < 500


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "n_embd", "n_head", "n_layer"])
def test_missing_entries_are_named(tmp_path, key):
    entries = config_entries(CONFIG)
    del entries[key]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=key):
        read_config(tmp_path)


def test_a_missing_model_type_is_a_line_to_add(tmp_path):
    entries = config_entries(CONFIG)
    del entries["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r'config\.json: model_type is missing.*add the line "model_type": "gpt2"'):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    with pytest.raises(ConfigError, match="model_type is None; only 'gpt2' can be loaded: take"):
        read_config(tmp_path)


def test_a_missing_context_size_has_its_present_name(tmp_path):
    entries = config_entries(CONFIG)
    del entries["n_positions"], entries["n_ctx"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="n_positions is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "malformed JSON"),
        (b'{"n_head": 3', "malformed JSON"),
        (b"\xff\xfe{}", "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"n_head": ' + b"9" * 5000 + b"}", "malformed JSON"),
        (b'{"n_head": 3, "n_head": 5}', "'n_head' is there 2 times"),
        (b"[1]", "no JSON object"),
        (b" " * 10_000_001, "larger than"),
    ],
    ids=["empty", "cut", "bytes", "deep", "digits", "twice", "list", "large"],
)
def test_a_malformed_config_is_refused(tmp_path, text, complaint):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{complaint}"):
        read_config(tmp_path)


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


# --- writing --------------------------------------------------------------------------------------------------------


class TwoFiles:
    """A tokenizer, as far as saving goes."""

    def check_place(self, directory):
        if os.path.exists(os.path.join(directory, "tokenizer.json")):
            raise CheckpointError("another tokenizer")

    def save(self, directory):
        for name in ("vocab.json", "merges.txt"):
            with open(os.path.join(directory, name), "w") as file:
                file.write(name)


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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


def test_an_adapter_alone_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has an adapter \(PEFT\).* merge_and_unload"):
        read_config(tmp_path)


# --- what is carried along ------------------------------------------------------------------------------------------

STATED = config_entries(CONFIG, eos_token_id=[0, 24], bos_token_id=7, pad_token_id=11, task_specific_params={"x": [1]})
OTHERS = {"README.md": b"# Card", "chat_template.jinja": b"{{ x }}", "LICENSE": b"MIT", "training_args.bin": b"\x80"}


def fine_tune(directory, **generation):
    """A checkpoint with entries and files that gpt-xp does not use, and others that must not be carried."""
    write_checkpoint(directory, make_tensors(CONFIG))
    (directory / "config.json").write_text(json.dumps(STATED))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    for name, content in OTHERS.items():
        (directory / name).write_bytes(content)
    for name in ("pytorch_model.bin", "tf_model.h5", "optimizer.pt", "model.ckpt.index", ".hidden", "gpt-xp.json"):
        (directory / name).write_bytes(b"of the old weights")
    (directory / "runs").mkdir()
    return directory


def save_again(source, target, config=None):
    carried = read_carried(source)
    params = read_params(source, config_of_carried(carried))
    checkpoint.save(target, params, config or config_of_carried(carried), None, carried)
    return json.loads((target / "config.json").read_text())


def test_save_carries_all_entries_and_files(tmp_path):
    generation = {"eos_token_id": 24, "max_length": 50, "transformers_version": "4.30.0"}
    source = fine_tune(tmp_path / "old", **generation)
    entries = save_again(source, tmp_path / "new")
    assert entries | STATED == entries
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == generation
    assert listing(tmp_path / "new") == sorted([*OTHERS, "config.json", "generation_config.json", "model.safetensors"])
    assert {name: (tmp_path / "new" / name).read_bytes() for name in OTHERS} == OTHERS
    assert read_config(tmp_path / "new") == read_config(source)


def test_a_new_config_is_stated_everywhere(tmp_path):
    source = fine_tune(tmp_path / "old", eos_token_id=24, max_length=50)
    config = dataclasses.replace(read_config(source), eos_token_id=(17, 19), bos_token_id=None)
    entries = save_again(source, tmp_path / "new", config)
    assert (entries["eos_token_id"], entries["bos_token_id"], entries["pad_token_id"]) == ([17, 19], 17, 11)
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == {"max_length": 50}
    assert read_config(tmp_path / "new").eos_token_id == (17, 19)


def test_entries_that_speak_of_the_old_weights_are_not_carried(tmp_path):
    source = write_checkpoint(tmp_path / "old", make_tensors(CONFIG))
    (source / "config.json").write_text(
        json.dumps(config_entries(CONFIG, torch_dtype="bfloat16", architectures=["GPT2Model"], n_positions=37))
    )
    entries = save_again(source, tmp_path / "new")
    assert (entries["dtype"], entries["architectures"]) == ("float32", ["GPT2LMHeadModel"])
    assert "torch_dtype" not in entries


def test_saving_does_not_replace_files_of_others(tmp_path):
    source = fine_tune(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    (tmp_path / "new" / "generation_config.json").write_text('{"eos_token_id": 2}')  # of an older model
    save_again(source, tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == "mine"
    assert read_config(tmp_path / "new") == read_config(source)
    save_again(source, source)  # and into its own directory
    assert read_config(source) == read_config(tmp_path / "new")


def test_what_is_carried_may_be_gone(tmp_path):
    source = fine_tune(tmp_path / "old")
    carried, params = read_carried(source), read_params(source, CONFIG)
    source.rename(tmp_path / "elsewhere")
    checkpoint.save(tmp_path / "new", params, config_of_carried(carried), None, carried)
    assert read_config(tmp_path / "new") == read_config(tmp_path / "elsewhere")


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


# --- transformers as the oracle -------------------------------------------------------------------------------------


def transformers_model(dtype="float32"):
    import torch
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = TheirConfig(vocab_size=101, n_positions=37, n_embd=39, n_head=3, n_layer=2, bos_token_id=3, eos_token_id=5)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros, which would hide mistakes
            parameter.normal_()
    return model.to(getattr(torch, dtype))


def tensors_of(model):
    state = model.state_dict()
    return {name: state[f"transformer.{name}"].float().numpy() for name in shapes(CONFIG)}


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}], ids=["whole", "shards"])
def test_what_transformers_saves_is_read_bit_for_bit(tmp_path, dtype, options):
    model = transformers_model(dtype)
    model.save_pretrained(tmp_path, **options)
    assert (tmp_path / WEIGHTS).exists() == (not options)
    assert read_config(tmp_path) == CONFIG
    assert_same(read_params(tmp_path, CONFIG), tensors_of(model), np.float32)


@pytest.mark.oracle
def test_the_bare_model_is_read_too(tmp_path):
    model = transformers_model()
    model.transformer.save_pretrained(tmp_path)
    assert read_config(tmp_path) == CONFIG
    assert_same(read_params(tmp_path, CONFIG), tensors_of(model))


@pytest.mark.oracle
def test_a_classifier_is_read_without_its_head(tmp_path):
    from transformers import GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(transformers_model().config)
    model.save_pretrained(tmp_path)
    with pytest.warns(GptXpWarning, match=r"is loaded without score\.weight"):
        assert_same(read_params(tmp_path, read_config(tmp_path)), tensors_of(model))


@pytest.mark.oracle
def test_what_save_model_of_safetensors_keeps_is_read(tmp_path):
    """It keeps one name of each matrix, and which one is written into the header."""
    from safetensors.torch import save_model

    model = transformers_model()
    model.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / WEIGHTS))
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        names = {*file.keys()}
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    assert_same(read_params(tmp_path, read_config(tmp_path)), tensors_of(model))


@pytest.mark.oracle
def test_untied_matrices_that_are_equal_give_the_logits_of_transformers(tmp_path):
    import torch
    from transformers import GPT2LMHeadModel

    import gpt_xp

    model = transformers_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert {"lm_head.weight", "transformer.wte.weight"} <= {*file.keys()}
    tokens = [3, 100, 0, 5, 77]
    with torch.inference_mode():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(torch.tensor([tokens])).logits[0].numpy()
    ours = gpt_xp.Model(read_params(tmp_path, CONFIG), read_config(tmp_path), None, "numpy").logits(tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_transformers_reads_what_we_save_to_equal_logits(tmp_path, dtype):
    import torch
    from transformers import GPT2LMHeadModel

    model = transformers_model(dtype)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint.save(tmp_path / "ours", read_params(tmp_path / "theirs", CONFIG, None), CONFIG)
    reread, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    theirs, ours = model.state_dict(), reread.eval().state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, ours[name]), name
    tokens = torch.tensor([[1, 100, 3, 5, 88]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reread(tokens).logits)


@pytest.mark.oracle
def test_transformers_has_the_same_config_from_ours_as_from_its_own(tmp_path):
    from transformers import AutoConfig

    transformers_model().save_pretrained(tmp_path / "theirs")
    checkpoint.save(tmp_path / "ours", nested(make_tensors(CONFIG)), CONFIG)
    theirs, ours = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours"))
    assert ours.pop("n_ctx") == 37  # the one entry that transformers no longer writes
    for entries in (theirs, ours):
        del entries["transformers_version"], entries["_name_or_path"]
    assert ours == theirs


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
