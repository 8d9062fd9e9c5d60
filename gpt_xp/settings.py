"""The options of a generation, checked once and passed as one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypedDict

from gpt_xp.errors import SettingError
from gpt_xp.reporting.text import closest_first

TINY, HUGE = 1e-30, 1e30  # float32 logits stay finite when they are divided by these.


@dataclass(frozen=True)
class GenerationSettings:
    """The options of a generation. Raises `SettingError` for invalid values.

    - `max_tokens`: the most tokens to generate; None continues to the end of the context.
    - `temperature`: 0 chooses the likeliest token (greedy). The filters `top_k`, `top_p` and `min_p` then have no
      effect.
    - `top_k`, `top_p`, `min_p`, `repetition_penalty`: the filters, see `generation.sampling`. None turns one off, and
      so does 0 for `top_k`.
    - `stop`: one string or several that end a continuation.
    - `seed`: 0 to 2^64 - 1; None draws one for each call. A list holds one seed for each prompt of the call.
    - `ignore_eos`: continue after an end token, and keep it.
    - `num_samples`: the number of continuations of each prompt.
    - `speculate`: guess tokens from repeats in the text and check several at once, while that saves time. The text is
      the same, except for choices whose margin is within rounding.
    - `special_tokens`: read the spelling of a special token in the prompt, such as `<|endoftext|>`, as that token.
    """

    max_tokens: int | None = 40
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    seed: int | list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    num_samples: int = 1
    speculate: bool = False
    special_tokens: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda x: x == 0 or TINY <= x <= HUGE,
                      "0 (greedy) or a number from 1e-30 to 1e30")  # fmt: skip
        _check_number("top_k", self.top_k, _is_whole, "a whole number of at least 0 (0 is off)")
        _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1 (1 is off)")
        _check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number from 0 (off) to 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda x: TINY <= x <= HUGE,
                      "a number from 1e-30 to 1e30 (1 is off)")  # fmt: skip
        for seed in self.seed if isinstance(self.seed, list | tuple) else (self.seed,):
            _check_number("seed", seed, lambda x: _is_whole(x) and x < 2**64, "a whole number from 0 to 2^64 - 1")
        if isinstance(self.seed, list | tuple) and None in self.seed:
            raise SettingError("seed must hold a whole number for each prompt, and one of them is None")
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens)
        check_count("num_samples", self.num_samples)
        _check_stops(self.stop)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a continuation."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def filters(self) -> dict[str, Any]:
        """The arguments of `sampling.choose`, with None for filters that are off. JAX leaves those out of a program."""
        greedy = self.temperature == 0
        return {
            "temperature": None if greedy else float(self.temperature),
            "top_k": None if greedy or not self.top_k else self.top_k,
            "top_p": None if greedy or self.top_p in (None, 1) else self.top_p,
            "min_p": None if greedy or not self.min_p else self.min_p,
            "repetition_penalty": None if self.repetition_penalty in (None, 1) else self.repetition_penalty,
        }

    def seeds(self, n_prompts: int) -> list[int]:
        """Return the seed of each prompt. Raises `SettingError` for a list of another length."""
        if not isinstance(self.seed, list | tuple):
            return [int(self.seed or 0)] * n_prompts
        if len(self.seed) != n_prompts:
            raise SettingError(f"seed is a list of {len(self.seed)}, and there are {n_prompts} prompts: give one each")
        return [int(seed) for seed in self.seed]


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings` as keyword arguments, except `num_samples`, which decides the return type."""

    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int | list[int] | tuple[int, ...] | None
    ignore_eos: bool
    speculate: bool
    special_tokens: bool


class StreamOptions(GenerationOptions, total=False):
    """The fields of `GenerationSettings` as keyword arguments, including `num_samples`."""

    num_samples: int


def check_count(name: str, value: object) -> None:
    """Raise `SettingError` unless this is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_stops(stop: object) -> None:
    for each in stop if isinstance(stop, list | tuple) else () if stop is None else (stop,):
        if not isinstance(each, str) or not each:
            raise SettingError(f"stop must be one or several strings of at least one character, not {each!r}")


def _is_whole(x: Any) -> bool:
    return isinstance(x, Integral) and int(x) >= 0


def _check_number(name: str, value: object, fits: Callable[[Any], bool], expected: str) -> None:
    if value is None and name != "temperature":
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not fits(value):
        raise SettingError(f"{name} must be {expected}, not {value!r}")


def merged(settings: GenerationSettings | None, options: Any) -> GenerationSettings:
    """Return the settings (None: the defaults) with these options in place of theirs.

    Raises `SettingError` for settings of another type, and `TypeError` for an option that does not exist.
    """
    known = [field.name for field in fields(GenerationSettings)]
    if settings is not None and not isinstance(settings, GenerationSettings):
        raise SettingError(f"settings must be a gpt_xp.GenerationSettings, not {settings!r:.80}")
    for name in options.keys() - {*known}:
        raise TypeError(f"a generation has no option {name!r}; the nearest is {closest_first(name, known)[0]!r}")
    return replace(settings or GenerationSettings(), **options)
