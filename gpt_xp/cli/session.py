"""What stands between the options and the library: a model, what it is called, and how to generate."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gpt_xp.api import Model, load
from gpt_xp.cli.output import is_terminal, note, waiting
from gpt_xp.errors import SettingError
from gpt_xp.generation import Generation, Piece
from gpt_xp.hub import DEFAULT, find_model
from gpt_xp.sampling import Sampling
from gpt_xp.streaming import check_stops

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Session:
    """A loaded model under the name that the user gave, and the keyword arguments of `Model.stream`."""

    name: str
    model: Model
    settings: dict[str, Any]

    def stream(self, prompt: str) -> Iterator[Piece]:
        """Continue a prompt; its errors come before this returns."""
        return self.model.stream(prompt, **self.settings)

    def generate(self, prompts: Sequence[str]) -> list[Generation]:
        """Continue several prompts together; the samples of each stand together."""
        results: list[Generation] = self.model.generate(prompts, **self.settings)
        return results


def check_settings(settings: dict[str, Any]) -> None:
    """Raise a usage error for what makes no sense, before a model is loaded."""
    try:
        Sampling(**{name: settings[name] for name in SAMPLING}, seed=settings["seed"] or 0)
        check_stops(settings["stop"])
    except SettingError as error:
        raise click.UsageError(str(error)) from None


def locate(model: str | None, model_size: str | None = None, models_dir: str | None = None) -> tuple[str, Path]:
    """Return the name and the directory of the model that is asked for, in gpt-xp's words or in picoGPT's."""
    if model_size is not None or models_dir is not None:
        if model is not None:
            raise click.UsageError("give --model, or picoGPT's --model_size and --models_dir, not both")
        size = model_size or "124M"  # picoGPT's default
        model = size if models_dir is None else str(Path(models_dir) / size)
    if model is None and is_terminal(sys.stderr):
        note(f"using the bundled model {DEFAULT}; --model takes another")
    return model or DEFAULT, find_model(model)


def load_model(model: str | None, model_size: str | None, models_dir: str | None, **options: Any) -> tuple[str, Model]:
    """Return the model that is asked for, and its name."""
    name, directory = locate(model, model_size, models_dir)
    with waiting(f"loading {name}"):
        return name, load(directory, **options)
