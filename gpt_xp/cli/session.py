"""What stands between the options and the library: a model, what it is called, and how to generate."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gpt_xp.cli.output import is_terminal, note, waiting
from gpt_xp.cli.wording import is_from_variable
from gpt_xp.errors import SettingError
from gpt_xp.generation.results import Generation, Piece
from gpt_xp.hub.find import BUNDLED_DEFAULT, PUBLISHED_DEFAULT, default_model, find_in_models_dir, find_model
from gpt_xp.model import Model, load
from gpt_xp.quantization import quantized_backend
from gpt_xp.registry import default_backend, get_backend
from gpt_xp.settings import GenerationSettings
from gpt_xp.tokenizer.bpe import Tokenizer

PICOGPT_DEFAULT = "124M"


@dataclass(frozen=True)
class Session:
    """A loaded model under the name that the user gave, and how to generate."""

    name: str
    model: Model
    settings: GenerationSettings

    def stream(self, prompt: str) -> Iterator[Piece]:
        """Continue a prompt; its errors come before this returns."""
        return self.model.stream(prompt, self.settings)

    def generate(self, prompts: Sequence[str]) -> list[Generation]:
        """Continue several prompts together; the samples of each stand together."""
        return self.model.generate(list(prompts), self.settings)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise a usage error for what makes no sense, before a model is loaded."""
    try:
        GenerationSettings(**settings)
    except SettingError as error:
        raise click.UsageError(str(error)) from None


def locate(
    model: str | None, offline: bool, model_size: str | None = None, models_dir: str | None = None
) -> tuple[str, Path]:
    """Return the name and the directory of the model that is asked for, in gpt-xp's words or in picoGPT's."""
    if models_dir is not None:
        if not models_dir:
            raise click.UsageError("--models_dir is empty; . is the current directory")
        folder = find_in_models_dir(model_size or PICOGPT_DEFAULT, models_dir, offline=offline)
        return str(folder), folder
    model = model_size if model is None else model
    return default_model() if model is None else model, find_model(model, offline=offline)


def tell_special_tokens(tokenizer: Tokenizer | None, texts: Iterable[str], special_tokens: bool) -> None:
    """Say on stderr that a text spells a special token, where such tokens are plain text."""
    if special_tokens or tokenizer is None:
        return
    if spelled := next(filter(None, map(tokenizer.first_special, texts)), None):
        tell_spelled(spelled)


def tell_spelled(token: str) -> None:
    """Say on stderr that this special token was read as plain text."""
    note(f"{token} in the text is read as plain text; --special-tokens reads it as one token")


def tell_default() -> None:
    """Say on a terminal which model is used, where none was named, and how to have another."""
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
) -> tuple[str, Model]:
    """Return the model that is asked for, and its name."""
    if (model_size, models_dir) != (None, None) and is_from_variable(click.get_current_context(silent=True), "model"):
        model = None
    if model is not None and (model_size is not None or models_dir is not None):
        raise click.UsageError("give --model, or picoGPT's --model_size and --models_dir, not both")
    if (model, model_size, models_dir) == (None, None, None):
        tell_default()
    with waiting(f"loading {backend or default_backend()}"):
        chosen = get_backend(backend, **options)  # its errors before a model is fetched
        chosen.keep_compiled()
        if quantize:
            chosen = quantized_backend(chosen)
    name, directory = locate(model, offline, model_size, models_dir)
    with waiting(f"loading {name}"):
        return name, load(directory, backend=chosen, quantize=quantize)
