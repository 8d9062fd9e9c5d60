"""Settings of trainings of a few steps, and the files that they write."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {"n_layer": 1, "n_head": 3, "n_embd": 39, "n_ctx": 37, "vocab_size": 277}


SMALL = {
    **SHAPE,
    "steps": 7,
    "warmup": 2,
    "batch_size": 5,
    "accumulate": 1,
    "eval_every": 3,
    "learning_rate": 0.01,
    "seed": 11,
}


EVERYTHING = {**SMALL, "accumulate": 2, "weight_dropout": 0.1, "average": 0.9}


def story(n_words: int, seed: int = 0) -> str:
    """Return text that can be learned: few words, in an order that often repeats."""
    words = ["the", "king", "queen", "said:", "O", "night,", "my", "lord!", "shall", "we", "not", "speak?\n", "é"]
    random = np.random.RandomState(seed)
    places = np.cumsum(random.randint(1, 4, size=n_words)) % len(words)
    return " ".join(words[place] for place in places) + "\n"


def bits(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def log(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of train.jsonl without the times."""
    lines = (directory / "train.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
