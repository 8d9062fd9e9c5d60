"""gpt-xp's own contenders: a model on one backend, and the floor."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.generation.loop import BLOCK_STEPS
from gpt_xp.loading import load
from gpt_xp.registry import get_backend

NumpyArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
Work = Callable[[], None]

LINEAR = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))
FLOOR_CHUNK = 128  # tokens that the floor multiplies together in prefill
TRIALS = 3  # runs of each way, to find the fastest way


def make(job: dict[str, Any]) -> "GptXp | Floor":
    """Return the contender of a job, a dict of "contender" ("gpt-xp" or "floor") and the arguments of its class."""
    arguments = {name: value for name, value in job.items() if name != "contender"}
    return Floor(**arguments) if job["contender"] == "floor" else GptXp(**arguments)


class GptXp:
    """A model on one backend. `quantize` is as for `load`, and `sampling` are arguments of `Model.stream`.

    The number of threads comes from environment variables, which the libraries read.
    """

    def __init__(
        self,
        model: str,
        backend: str,
        device: str | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        chosen = get_backend(backend, device=device, dtype=dtype).replace(waits_for_compiling=True)
        chosen.keep_compiled()  # The command owns this process, so it may change this setting of JAX.
        self._model = load(model, backend=chosen, quantize=quantize)
        self._quantize = quantize
        self._sampling = {"seed": 0, **(sampling or {})}

    def describe(self) -> dict[str, Any]:
        """Return the backend's name, version, device, dtype (or how it is quantized) and settings."""
        backend = self._model.backend
        return {
            "name": backend.name,
            "version": backend.version,
            "device": backend.device,
            "dtype": self._quantize or backend.dtype,
            "settings": backend.settings(),
        }

    def logits(self, tokens: list[int]) -> NumpyArray:
        """Return the logits [n_vocab] after the last token."""
        logits: NumpyArray = self._model.logits(tokens)[-1]
        return logits

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, and of each later token of all rows."""
        times = [time.perf_counter()]
        pieces = self._model.stream(prompts, max_tokens=n_tokens, ignore_eos=True, **self._sampling)
        for _ in range(n_tokens):
            for _ in prompts:  # A step yields one piece of each row.
                next(pieces)
            times.append(time.perf_counter())
        seconds = np.diff(times)
        if self._come_together:
            seconds[1:] = (times[-1] - times[1]) / self._steps(n_tokens - 1)
        return seconds.tolist()

    @property
    def _come_together(self) -> bool:
        """True if several tokens appear at once, so that the time between two tokens has no meaning."""
        return bool(self._sampling.get("speculate") or self._model.backend.decode_block)

    def _steps(self, n_later: int) -> int:
        """Return how many tokens were computed for `n_later` after the first; a block is always computed to its end."""
        if self._sampling.get("speculate"):
            return max(n_later, 1)
        return max(-(-n_later // BLOCK_STEPS) * BLOCK_STEPS, 1)

    def peak_memory(self) -> int | None:
        """Return the peak memory in bytes."""
        return self._model.backend.peak_memory()

    def compile_seconds(self) -> float:
        """Return the seconds spent on compiling so far."""
        return self._model.backend.compile_seconds()


class Floor:
    """The matrix products of a model alone, in NumPy and float32: no generation can be faster.

    Prefill multiplies the rows of all prompts with the weights of every linear layer, and the last row of each prompt
    with the token table. It tries chunks of 128 tokens of each prompt and all rows at once, and takes the faster way.
    Decode multiplies one row of each prompt with all these weights. It tries products from the left and transposed
    products from the right. It also reads the keys and values of the cache once, by a product with a vector.
    """

    def __init__(self, model: str) -> None:
        self._config = read_config(model)
        params = read_params(model, self._config)
        self._linears = [block[part][name]["w"] for block in params["blocks"] for part, name in LINEAR]
        self._table = [params["wte"].T]
        self._chosen: dict[str, Work] = {}
        self._buffers: dict[tuple[int, int, str], NumpyArray] = {}
        self._kept: NumpyArray | None = None

    def describe(self) -> dict[str, Any]:
        """Return NumPy's version."""
        return {"name": "numpy", "version": np.__version__, "device": "cpu", "dtype": "float32", "settings": {}}

    def logits(self, tokens: list[int]) -> None:
        """Return None: the floor computes products, and no logits."""

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill's products, then those of each later token's products and cache read."""
        batch, context = len(prompts), len(prompts[0])
        prefill, decode = self._prefill(batch, context), self._decode(batch)
        cache = self._cache(batch, context + n_tokens)
        times = [time.perf_counter()]
        prefill()
        times.append(time.perf_counter())
        for step in range(1, n_tokens):
            decode()
            self._read(cache, batch * self._config.n_head * (context + step))
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def _prefill(self, batch: int, context: int) -> Work:
        chunks = [batch * min(FLOOR_CHUNK, context - begin) for begin in range(0, context, FLOOR_CHUNK)]

        def in_sizes(sizes: list[int]) -> Work:
            blocks = [self._products(rows, self._linears) for rows in sizes]
            return _in_order([*blocks, self._products(batch, self._table)])

        return self._fastest(f"prefill {batch} {context}", [in_sizes(chunks), in_sizes([batch * context])])

    def _decode(self, batch: int) -> Work:
        everything = self._linears + self._table
        ways = [self._products(batch, everything), self._transposed_products(batch, everything)]
        return self._fastest(f"decode {batch}", ways)

    def _fastest(self, name: str, ways: list[Work]) -> Work:
        """Return the fastest way. It is measured once, in the warm-up."""
        if name not in self._chosen:
            self._chosen[name] = min(ways, key=lambda way: min(_seconds(way) for _ in range(TRIALS)))
        return self._chosen[name]

    def _products(self, rows: int, matrices: list[NumpyArray]) -> Work:
        """Return a function that computes [rows, n_in] @ [n_in, n_out] for each matrix."""
        steps = [(self._buffer(rows, len(w)), w, self._buffer(rows, w.shape[1], "out")) for w in matrices]
        return lambda: _multiply(steps)

    def _transposed_products(self, rows: int, matrices: list[NumpyArray]) -> Work:
        """Return a function that computes [n_out, n_in] @ [n_in, rows] for each matrix."""
        steps = [(w.T, self._buffer(len(w), rows), self._buffer(w.shape[1], rows, "out")) for w in matrices]
        return lambda: _multiply(steps)

    def _buffer(self, rows: int, columns: int, use: str = "in") -> NumpyArray:
        return self._buffers.setdefault((rows, columns, use), np.full((rows, columns), 0.5, dtype=np.float32))

    def _cache(self, batch: int, context: int) -> NumpyArray:
        """Return keys and values [2 * n_layer, batch * n_head * context, d_head].

        Only the array of the last size is kept, because it can be large.
        """
        config = self._config
        shape = (2 * config.n_layer, batch * config.n_head * context, config.n_embd // config.n_head)
        if self._kept is None or self._kept.shape != shape:
            self._kept = np.full(shape, 0.5, dtype=np.float32)
        return self._kept

    def _read(self, cache: NumpyArray, rows: int) -> None:
        """Read the first `rows` rows of every layer; a layer has a row for each head and token of each prompt."""
        vector = self._buffer(cache.shape[-1], 1)
        for layer in cache:
            layer[:rows] @ vector


def _multiply(steps: list[tuple[NumpyArray, NumpyArray, NumpyArray]]) -> None:
    for left, right, out in steps:
        np.matmul(left, right, out=out)


def _in_order(works: list[Work]) -> Work:
    def work() -> None:
        for each in works:
            each()

    return work


def _seconds(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
