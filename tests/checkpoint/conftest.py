"""Fixtures for the tests of checkpoints."""

import pytest
from checkpoint_files import CONFIG, make_tensors, prefixed
from openai_files import write_texts


@pytest.fixture
def parts():
    """The tensors of three shards."""
    tensors = list(prefixed(make_tensors(CONFIG)).items())
    return [dict(tensors[:5]), dict(tensors[5:20]), dict(tensors[20:])]


@pytest.fixture
def folder(tmp_path):
    """OpenAI's files but for the tensors, which the fake TensorFlow has."""
    directory = write_texts(tmp_path / "model")
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (directory / "model.ckpt.index").write_bytes(b"index 1")
    return directory
