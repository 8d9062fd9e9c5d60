"""transformers as the oracle: what it writes is read bit for bit, and what gpt-xp writes it reads."""

import numpy as np
import pytest
from checkpoint_files import CONFIG, WEIGHTS, assert_same, make_tensors, nested, shapes
from safetensors import safe_open

from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import GptXpWarning

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
