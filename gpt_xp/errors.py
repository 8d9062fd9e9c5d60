"""The errors that gpt-xp raises on purpose, all of them subclasses of `GptXpError`.

Each message says what was wrong, what was expected, and what to do. The command prints it as one line on stderr and
exits with code 1. Any other exception that escapes is a bug in gpt-xp.
"""


class GptXpError(Exception):
    """The parent of all errors that gpt-xp raises on purpose."""


class GptXpWarning(UserWarning):
    """A warning about a model that can still be used. The command line prints it as one line on stderr."""


class ConfigError(GptXpError):
    """A config that does not describe GPT-2's mathematics, or contradicts itself."""


class CheckpointError(GptXpError):
    """A checkpoint on disk that cannot be read or does not fit its config, or a file that cannot be written."""


class ModelNotFoundError(GptXpError):
    """A model name or directory that does not exist."""


class DownloadError(GptXpError):
    """A file that could not be fetched: no network, no such file, no space for it, or wrong bytes."""


class TokenizerError(GptXpError):
    """Tokenizer files that are malformed or do not fit each other, or text that has no tokens."""


class TextError(GptXpError):
    """A text file that cannot be read: missing, a directory, empty, or not UTF-8."""


class JsonError(GptXpError, ValueError):
    """Text that is not JSON."""


class JsonLimitError(JsonError):
    """JSON that exceeds a limit of gpt-xp: nested too deeply, or an integer of too many digits."""


class PromptError(GptXpError):
    """A prompt, or token ids, that the model cannot take: too long, empty, out of range."""


class SettingError(GptXpError, ValueError):
    """An option of generation, sampling, scoring or training with an invalid value."""


class BackendError(GptXpError):
    """A backend, device or dtype that is unknown, not installed, or not usable here; `fix` says what to do."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem if fix is None else f"{problem}: {fix}")
        self.problem, self.fix = problem, fix


class NumericalError(GptXpError):
    """Logits that are not finite: damaged weights, or numbers too large for a half-precision dtype."""


class DeviceMemoryError(GptXpError):
    """The device has too little memory for a request; the message names sizes."""
