"""A loaded model with the settings of a generation, and their check."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

import gpt_xp
from gpt_xp.errors import SettingError
from gpt_xp.generation.results import Generation, Piece
from gpt_xp.settings import GenerationSettings


@dataclass(frozen=True)
class Session:
    """A loaded model, its name as the user gave it, and the settings of a generation."""

    name: str
    model: "gpt_xp.Model"
    settings: GenerationSettings

    def stream(self, prompt: str) -> Iterator[Piece]:
        """Continue a prompt. Raises the errors of `Model.stream` before it returns."""
        return self.model.stream(prompt, self.settings)

    def generate(self, prompts: Sequence[str]) -> list[Generation]:
        """Continue several prompts together; the samples of one prompt follow each other."""
        return self.model.generate(list(prompts), self.settings)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise a usage error for settings that make no sense, before a model is loaded."""
    try:
        GenerationSettings(**settings)
    except SettingError as error:
        raise click.UsageError(str(error)) from None
