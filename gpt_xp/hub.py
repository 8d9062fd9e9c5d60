"""From the name of a model to a directory on disk."""

from pathlib import Path

from gpt_xp.backend import closest_first
from gpt_xp.errors import ModelNotFoundError

BUNDLED = Path(__file__).parent / "models"
DEFAULT = "shakespeare"


def find_model(name: str | Path | None = None) -> Path:
    """Return the directory of the model called `name`: a directory, or the name of a bundled model (the default).

    Raises `ModelNotFoundError` for anything else. A directory comes before a bundled model of the same name.
    """
    if name is None:
        return BUNDLED / DEFAULT
    if Path(name).is_dir():
        return Path(name)
    known = sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
    if str(name) in known:
        return BUNDLED / name
    raise ModelNotFoundError(
        f"there is no directory {str(name)!r}, and no model of that name: give a directory that holds config.json, "
        f"model.safetensors and tokenizer files, or one of: {', '.join(closest_first(str(name), known))}"
    )
