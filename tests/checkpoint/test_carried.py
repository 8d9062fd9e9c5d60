"""Entries and files that gpt-xp does not use are saved again."""

import dataclasses
import json

from checkpoint_files import CONFIG, config_entries, listing, make_tensors, write_checkpoint

from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.config_json import config_of as config_of_carried
from gpt_xp.checkpoint.config_json import read_carried, read_config
from gpt_xp.checkpoint.weights import read_params

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
