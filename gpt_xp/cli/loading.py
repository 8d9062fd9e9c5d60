"""Find and load the model that the options name."""

import sys
from pathlib import Path
from typing import Any

import click

import gpt_xp
from gpt_xp.cli.output import is_terminal, note, waiting
from gpt_xp.cli.wording import is_from_variable
from gpt_xp.hub.find import BUNDLED_DEFAULT, PUBLISHED_DEFAULT, default_model, find_in_models_dir, find_model
from gpt_xp.quantization import quantized_backend
from gpt_xp.registry import default_backend, get_backend

PICOGPT_DEFAULT = "124M"


def locate(
    model: str | None, offline: bool, model_size: str | None = None, models_dir: str | None = None
) -> tuple[str, Path]:
    """Return the name and the directory of the model that gpt-xp's or picoGPT's options name."""
    if models_dir is not None:
        if not models_dir:
            raise click.UsageError("--models_dir is empty; . is the current directory")
        folder = find_in_models_dir(model_size or PICOGPT_DEFAULT, models_dir, offline=offline)
        return str(folder), folder
    model = model_size if model is None else model
    return default_model() if model is None else model, find_model(model, offline=offline)


def note_default_model() -> None:
    """Write a line on a terminal that names the default model, and how to choose another."""
    if not is_terminal(sys.stderr):
        return
    if (model := default_model()) == BUNDLED_DEFAULT:
        note(f"using the bundled model {model}; `gpt-xp models pull {PUBLISHED_DEFAULT}` gets GPT-2")
    else:
        note(f"using {model}; --model takes another")


def load_model(
    model: str | None,
    offline: bool,
    model_size: str | None,
    models_dir: str | None,
    backend: str | None,
    quantize: str | None,
    **options: Any,
) -> tuple[str, "gpt_xp.Model"]:
    """Load the model that the options name; return its name and the model."""
    if (model_size, models_dir) != (None, None) and is_from_variable(click.get_current_context(silent=True), "model"):
        model = None
    if model is not None and (model_size is not None or models_dir is not None):
        raise click.UsageError("give --model, or picoGPT's --model_size and --models_dir, not both")
    if (model, model_size, models_dir) == (None, None, None):
        note_default_model()
    with waiting(f"loading {backend or default_backend()}"):
        chosen = get_backend(backend, **options)  # Its errors come before a model is fetched.
        chosen.keep_compiled()
        if quantize:
            chosen = quantized_backend(chosen, quantize)
    name, directory = locate(model, offline, model_size, models_dir)
    with waiting(f"loading {name}"):
        return name, gpt_xp.load(directory, backend=chosen, quantize=quantize)
