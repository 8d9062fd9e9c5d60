"""A `Model` ties params, config, tokenizer and backend together: the object that users hold."""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, overload

import numpy as np

from gpt_xp.backend import Backend
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.carried import Carried
from gpt_xp.checkpoint.tensors import check_params
from gpt_xp.config import GPT2Config, check_config
from gpt_xp.errors import PromptError, SettingError
from gpt_xp.generation.decoder import Decoder
from gpt_xp.generation.loop import Generator
from gpt_xp.generation.results import Generation, Piece
from gpt_xp.generation.rows import Prompt
from gpt_xp.inspection.trace import Names, trace_names, wide_trace
from gpt_xp.memory import array_bytes, cache_bytes, memory_errors, too_little_memory
from gpt_xp.prompts import Numbers, OnePrompt, Prompts, Text, check_ids, is_one_prompt, token_array
from gpt_xp.quantization import Quantized, n_bytes, quantization_of, quantized_backend
from gpt_xp.registry import get_backend
from gpt_xp.scoring.rank import RankedChoice, rank_choices
from gpt_xp.scoring.score import Score, TokenizedText, TokensDone, score_texts
from gpt_xp.scoring.windows import Windows
from gpt_xp.settings import GenerationOptions as Options
from gpt_xp.settings import GenerationSettings, StreamOptions, merged
from gpt_xp.tokenizer.bpe import Tokenizer
from gpt_xp.tree import leaves
from gpt_xp.types import NumpyArray, Params

if TYPE_CHECKING:
    from gpt_xp.inspection.results import Look

Settings: TypeAlias = GenerationSettings | None


class Model:
    """GPT-2 on one backend.

    `params` is a nested dict of arrays of NumPy or of the backend, quantized or not. `backend` is a name or a
    `Backend`. Without a tokenizer, prompts are token ids and there is no text.

    Raises `ConfigError` if the arguments do not fit each other, `BackendError` if the backend cannot be used, and
    `DeviceMemoryError` if the params do not fit the device.
    """

    def __init__(
        self,
        params: Params,
        config: GPT2Config,
        tokenizer: Tokenizer | None = None,
        backend: str | Backend | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        self.tokenizer = tokenizer
        self.backend = get_backend(backend)
        self.params = params
        self._carried: Carried | None = None  # entries and files that gpt-xp does not use, for `save`

    @property
    def params(self) -> Params:
        """The weights, on the device. Other weights of the same shapes can be assigned; they are checked and moved.

        Raises `ConfigError` if they do not fit the config, and `DeviceMemoryError` if they do not fit the device.
        """
        return self._decoder.params

    @params.setter
    def params(self, params: Params) -> None:
        params = self.backend.unplaced(params, self.config)
        check_params(params, self.config)
        if quantization_of(params):
            object.__setattr__(self, "backend", quantized_backend(self.backend))
        dtype = self.backend.dtype
        self._bytes = sum(n_bytes(x) if isinstance(x, Quantized) else array_bytes(x, dtype) for x in leaves(params))
        with memory_errors(self.backend, self.config, self._bytes, 0):
            placed = self.backend.place(params, self.config)
        self._decoder = Decoder(placed, self.config, self.backend)
        self._generator = Generator(self._decoder, self.tokenizer)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute. Raises `AttributeError` for config, tokenizer and backend, which are set only once."""
        if name in ("config", "tokenizer", "backend") and name in vars(self):
            raise AttributeError(
                f"a model's {name} cannot be replaced: "
                "make another model by gpt_xp.Model(params, config, tokenizer, backend)"
            )
        super().__setattr__(name, value)

    def logits(self, token_ids: Any) -> "np.ndarray[Any, Any]":
        """Return the logits after each token, a NumPy array [n_seq, n_vocab] or [batch, n_seq, n_vocab].

        `token_ids` is [n_seq] or [batch, n_seq] of ints. The logits are float32, or float64 for a float64 model. Raises
        `PromptError` for ids outside the vocabulary, and for more than `n_ctx` of them.
        """
        ids = token_array(token_ids)
        check_ids(ids, self.config, self.tokenizer)
        self.config.check_length(ids.shape[-1])
        rows = ids[None] if ids.ndim == 1 else ids
        with memory_errors(self.backend, self.config, self._bytes, len(rows)):
            logits = np.concatenate(list(self._decoder.prompt_logits(rows)), axis=1)
        return logits[0] if ids.ndim == 1 else logits

    @overload
    def generate(
        self, prompt: OnePrompt, settings: None = None, *, num_samples: Literal[1] = 1, **options: Unpack[Options]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: Prompts, settings: Settings = None, *, num_samples: int = 1, **options: Unpack[Options]
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: OnePrompt | Prompts | Numbers,
        settings: Settings = None,
        *,
        num_samples: int = 1,
        **options: Unpack[Options],
    ) -> Generation | list[Generation]: ...

    def generate(self, prompt: Any, settings: Settings = None, **options: Any) -> Generation | list[Generation]:
        """Continue `prompt`; return a `Generation`, or a list for a list of prompts or several samples.

        A prompt is text or token ids; an empty one is the token that begins a text (`bos_token_id`). The options are
        the fields of `GenerationSettings`, which describes them; they override those of `settings`. With `num_samples`,
        the samples of the first prompt come first, then those of the second.

        Raises `PromptError` for a prompt that does not fit the context or the vocabulary, `SettingError` for invalid
        options, and `DeviceMemoryError`.
        """
        chosen = merged(settings, options)
        results = [piece.result for piece in self.stream(prompt, chosen) if piece.result is not None]
        return results[0] if is_one_prompt(prompt) and chosen.num_samples == 1 else results

    def stream(
        self, prompt: OnePrompt | Prompts | Numbers, settings: Settings = None, **options: Unpack[StreamOptions]
    ) -> Iterator[Piece]:
        """Yield the text of `generate` as it is generated: a `Piece` has `text`, and the `index` of its row.

        The last piece of each row has no text and holds the `result`. Arguments and errors are those of `generate`.
        Arguments are checked before this returns.
        """
        called = time.perf_counter()
        chosen = merged(settings, options)
        if chosen.stop_strings and self.tokenizer is None:
            raise SettingError("a stop string needs a tokenizer, and this model has none")
        texts: Any = [prompt] if is_one_prompt(prompt) else prompt
        seeds = chosen.seeds(len(texts))
        encoded = [self._encode(text, chosen.special_tokens) for text in texts]
        self._check_memory(encoded, chosen)
        prompts = [
            Prompt(ids, sample, seed)
            for ids, seed in zip(encoded, seeds, strict=True)
            for sample in range(chosen.num_samples)
        ]
        return self._guarded(prompts, chosen, called)

    def score(
        self,
        text: Text,
        *,
        convention: str = "huggingface",
        window: int | None = None,
        stride: int | None = None,
        crops: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        progress: TokensDone | None = None,
        special_tokens: bool = False,
    ) -> Score:
        """Return the log-probability of each token of `text`, and perplexities: a `Score`.

        `text` is text or token ids of any length. It is cut into windows of `window` tokens (default: the context) by
        `convention`: "huggingface", "lm-eval" or "nanogpt" (see `scoring.windows`). `stride` (default: half a window)
        is for "huggingface"; `crops` (their number, default 1000) and `seed` are for "nanogpt". `batch_size` windows
        are computed at a time. `progress(done, total)` is called with the number of tokens done. `special_tokens` is as
        in `generate`.

        Raises `PromptError` for an empty text and ids outside the vocabulary, `SettingError` for other invalid
        arguments, `NumericalError` and `DeviceMemoryError`.
        """
        windows = Windows(convention, window, stride, crops, seed)
        return self._scores([text], windows, batch_size, progress, special_tokens)[0]

    def score_each(
        self,
        texts: Sequence[Text],
        *,
        convention: str = "huggingface",
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        special_tokens: bool = False,
    ) -> list[Score]:
        """Return the `score` of each text. Texts of similar length are best given together: `batch_size` at a time."""
        windows = Windows(convention, window, stride)
        return self._scores(texts, windows, batch_size, None, special_tokens)

    def _scores(
        self, texts: Sequence[Text], windows: Windows, batch_size: int, progress: TokensDone | None, special: bool
    ) -> list[Score]:
        found = [
            TokenizedText(self._token_ids(each, special), each if isinstance(each, str) else None) for each in texts
        ]
        with memory_errors(self.backend, self.config, self._bytes, batch_size):
            self.backend.check_agreement((found, windows, batch_size))
            return score_texts(self._generator, found, windows, batch_size, progress) if found else []

    def rank(
        self,
        prompt: Text,
        choices: Sequence[Text],
        *,
        by: str = "total",
        batch_size: int = 8,
        special_tokens: bool = False,
    ) -> list[RankedChoice]:
        """Return the continuations `choices` of `prompt`, the likeliest first: a `RankedChoice` each.

        `by` is "total" (log-probability), "token" or "byte" (the same divided by the choice's tokens or bytes). Prompt
        and choices are either all text or all token ids. A choice that begins a new word begins with a space. An empty
        prompt is the token that begins a text. `special_tokens` is as in `generate`.

        Raises the errors of `score`, and `PromptError` if prompt and choice do not fit the context.
        """
        if isinstance(choices, str) or len({isinstance(each, str) for each in (prompt, *choices)}) > 1:
            raise PromptError("choices must be a list, of texts where the prompt is text, else of lists of token ids")
        given = [each if isinstance(each, str) else self._token_ids(each) for each in (prompt, *choices)]
        encode = functools.partial(self._token_ids, special_tokens=special_tokens)
        with memory_errors(self.backend, self.config, self._bytes, batch_size):
            self.backend.check_agreement((given, batch_size))
            return rank_choices(self._generator, given[0], given[1:], by, batch_size, encode)

    def trace(self, prompt: Text, names: Names = None, *, special_tokens: bool = False) -> dict[str, NumpyArray]:
        """Return named intermediates of the forward pass over one prompt, as NumPy arrays without a batch axis.

        `names` are names of `gpt_xp.trace`, which describes them, or patterns: "blocks.*.attn.hook_pattern". None takes
        all of them, which needs much memory for a long prompt. The arrays are float32, or float64 for a float64 model.
        `special_tokens` is as in `generate`. Raises `SettingError` for a name that matches nothing, and the errors of
        `generate`.
        """
        wanted = trace_names(self.config, names)
        ids = self.backend.asarray(np.asarray(self._encode(prompt, special_tokens), np.int32))
        step = self.backend.compile(wide_trace, static=("config", "names", "xp"))
        with memory_errors(self.backend, self.config, self._bytes, 1):
            found = step(self.params, ids, config=self.config, names=wanted, xp=self.backend.xp)
            return {name: self.backend.to_numpy(found[name]) for name in wanted}

    def look(
        self,
        prompt: Text,
        backends: str | Sequence[str] | None = None,
        *,
        position: int | None = None,
        max_size: int | None = None,
        special_tokens: bool = False,
    ) -> "Look":
        """Return what happens inside the model for one prompt: a `Look`, which a notebook shows as a page.

        It has the logits, the logit lens and the weights of attention, and for each of `backends` (names, as for
        `compare`) the distance from float64 on NumPy. All logits of the token at `position` (default: the last) are
        kept, and the largest of the others. `max_size` are the bytes that the page may have (default: 8 MB): of a long
        prompt, the weights of attention are rounded or made smaller, and the page says so. `special_tokens` is as in
        `generate`.

        Raises `SettingError` for a `position` or `max_size` that makes no sense, and the errors of `generate` and
        `compare`.
        """
        from gpt_xp.inspection.look import look  # It imports this module.

        return look(self, prompt, backends, position=position, max_size=max_size, special_tokens=special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write the model to `directory` as config.json, model.safetensors, vocab.json and merges.txt.

        transformers and `gpt_xp.load` read this layout. bfloat16 is written as float32. For a loaded model, config
        entries and files of its directory that gpt-xp does not use are written too; files that exist already stay. All
        files are written to temporary names and renamed at the end. Raises `CheckpointError` if writing fails.
        """
        params = self.backend.fetch(self.params, self.config)
        try:
            if self.backend.process_index == 0:
                checkpoint.save(directory, params, self.config, self.tokenizer, self._carried)
        finally:
            self.backend.wait_for_others("the model is saved")

    def _guarded(self, prompts: list[Prompt], settings: GenerationSettings, called: float) -> Iterator[Piece]:
        if not prompts:
            return
        with memory_errors(self.backend, self.config, self._bytes, len(prompts)):
            if settings.seed is None and settings.temperature:
                seed = self.backend.agreed(randbits(32))
                prompts = [replace(prompt, seed=seed) for prompt in prompts]
            self.backend.check_agreement((prompts, settings))
            yield from self._generator.run(prompts, settings, called)

    def _token_ids(self, prompt: Text, special_tokens: bool = False) -> list[int]:
        """Return the token ids of a prompt. Raises `PromptError` for ids outside the vocabulary."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("this model has no tokenizer: give token ids instead of text")
            ids: list[Any] = self.tokenizer.encode(prompt, special_tokens=special_tokens)
        else:
            is_list = isinstance(prompt, list | tuple | np.ndarray)
            ids = list(prompt) if is_list else []
            if not is_list or not all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids):
                raise PromptError(f"a prompt is text (str) or a list of token ids (whole numbers), not {prompt!r:.80}")
        check_ids(np.asarray(ids), self.config, self.tokenizer)
        return ids

    def _encode(self, prompt: Text, special_tokens: bool) -> list[int]:
        ids = self._token_ids(prompt, special_tokens)
        if not ids:
            if self._generator.first_token is None:
                raise PromptError("an empty prompt begins with the model's bos_token_id, and this model has none")
            ids = [self._generator.first_token]
        if len(ids) > self.config.n_ctx:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, and the context of this model holds {self.config.n_ctx}: "
                f"shorten it by {len(ids) - self.config.n_ctx}"
            )
        return ids

    def _check_memory(self, prompts: list[list[int]], settings: GenerationSettings) -> None:
        """Raise `DeviceMemoryError` at once for a cache that cannot fit, instead of failing late."""
        rows, n_ctx = len(prompts) * settings.num_samples, self.config.n_ctx
        longest = max(map(len, prompts), default=0)
        n_slots = self.backend.cache_slots(min(longest + (settings.max_tokens or n_ctx), n_ctx), n_ctx)
        has = self.backend.device_memory
        if has and cache_bytes(self.config, rows, n_slots, self.backend.dtype) > has:
            raise too_little_memory(self.backend, self.config, self._bytes, rows, n_slots)
