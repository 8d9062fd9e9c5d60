"""The weights of a checkpoint: read bit for bit in each dtype, whole or in shards, or refused where they do not fit."""

import os
import tracemalloc

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    PUBLISHED_HEADER,
    WEIGHTS,
    assert_same,
    config_of,
    file_bytes,
    leaves,
    make_tensors,
    only_the_head,
    prefixed,
    write_checkpoint,
    write_shards,
)

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.config import GPT2Config
from gpt_xp.errors import BackendError, CheckpointError, GptXpWarning

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
