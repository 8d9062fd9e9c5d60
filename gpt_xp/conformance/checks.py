"""The checks of one library. They run in its process, and each returns a `Check`."""

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp.arrays import device_of
from gpt_xp.comparison import worker
from gpt_xp.comparison.figures import compare_layers, difference
from gpt_xp.conformance.adapter import NamespaceBackend, find_library
from gpt_xp.conformance.functions import FUNCTIONS, evaluate, expected, small_arrays
from gpt_xp.conformance.inputs import TEXT_TOKENS, prompts_of
from gpt_xp.conformance.lines import describe, failing_line
from gpt_xp.conformance.namespaces import EagerNamespace, NumPyInPlace
from gpt_xp.conformance.results import Check
from gpt_xp.errors import BackendError
from gpt_xp.generation.noise import gumbel_noise
from gpt_xp.generation.sampling import Choice, choose
from gpt_xp.loading import load
from gpt_xp.model import Model
from gpt_xp.processes import one_line
from gpt_xp.prompts import shared_length
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.transformer import gpt2, lm_loss
from gpt_xp.tree import leaves, tree_map
from gpt_xp.types import Array, NumpyArray

# The speed is the best of at most 5 rounds, and no further round begins after 5 seconds.
ROUNDS, LONG = 5, 5.0
STATIC = ("config", "xp")
SHORTENED = 300  # characters


class Checks:
    """The checks of one library with one model. `module` is an adapter's name or a module's.

    NumPy computes the functions called `replaced`, which may be names of the namespace.
    """

    def __init__(self, module: str, folder: Path, jit: str | None, replaced: Sequence[str]) -> None:
        self.backend, self.used = find_library(module)
        if replaced:
            self.backend = self.backend.replace(xp=NumPyInPlace(self.backend, replaced))
        self._folder, self._jit = folder, _find_function(jit) if jit else None

    @functools.cached_property
    def model(self) -> Model:
        """The model on the library."""
        return load(self._folder, backend=self.backend)

    @functools.cached_property
    def reference(self) -> Model:
        """The model on NumPy in float64."""
        return load(self._folder, backend="numpy", dtype="float64")

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        """The token ids of the prompts."""
        assert self.reference.tokenizer is not None
        return prompts_of(self.reference.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Return the version, the device and the namespace."""
        return {"version": self.backend.version, "device": self.backend.device, "used": self.used}

    # --- the functions of the standard --------------------------------------------------------------------------------

    def function(self, name: str) -> Check:
        """Call a function as GPT-2 calls it, and compare with NumPy."""
        use = FUNCTIONS[name]
        for call in use.calls:
            try:
                problem = self._call(call)
            except Exception as error:
                problem = short(error)
                if isinstance(error, AttributeError) and not hasattr(self.backend.xp, name):
                    problem = "it is missing"
            if problem:
                return Check(name, "function", False, f"{call}: {problem}", use.needed_for)
        return Check(name, "function", True, "", use.needed_for)

    def _call(self, call: str) -> str:
        """Return what is wrong with the result of a call, or ""."""
        backend, wanted = self.backend, expected(call)

        def function(arrays: dict[str, Array]) -> Any:
            return evaluate(call, backend.xp, arrays, device_of(arrays["x"]))

        arrays = {name: backend.asarray(array) for name, array in small_arrays().items()}
        found = backend.compile(function)(arrays)
        is_array = bool(describe(found))
        found = backend.to_numpy(found) if is_array else np.asarray(found)
        # The standard leaves the integers of argmax to the library. A Python scalar has no dtype.
        dtypes = found.dtype.kind in "iu" if "argmax" in call else found.dtype == wanted.dtype
        if found.shape != wanted.shape or (is_array and not dtypes):
            return f"it returned {describe(found)}, and {describe(wanted)} was expected"
        return _far_off(found, wanted, TOLERANCE["function", "float32"])

    # --- the programs -------------------------------------------------------------------------------------------------

    def program(self, name: str) -> Check:
        """Run one of `PROGRAMS`, and compare with NumPy. An error has the line at which it arose."""
        run: dict[str, Callable[[], str]] = {
            "forward pass": self._forward_pass, "cache": self._cache, "loss": self._loss, "sampling": self._sampling,
        }  # fmt: skip
        try:
            problem = run[name]()
        except Exception as error:
            return self._failed(name, "program", error, run[name])
        return Check(name, "program", not problem, problem, figures={"ran": True})

    def _failed(self, name: str, kind: str, error: Exception, again: Callable[[], Any] | None = None) -> Check:
        """Return the check that an error ended. A lazy library computes late, so the line is looked for once more."""
        line, backend = failing_line(error), self.backend
        if line is None and again is not None and isinstance(backend, NamespaceBackend):
            lazy = backend.xp
            try:
                backend.xp = EagerNamespace(lazy, backend.computed)
                again()
            except Exception as second:
                line, error = failing_line(second), second
            finally:
                backend.xp = lazy
        return Check(name, kind, False, short(error), line=line)

    def _forward_pass(self) -> str:
        ids = self.prompts[1]
        return _far_off(
            self._logits(self.model, ids), self._logits(self.reference, ids), TOLERANCE["logits", "float32"]
        )

    def _logits(self, model: Model, ids: Sequence[int]) -> NumpyArray:
        """Return the logits of a whole forward pass, without a cache."""
        backend = model.backend
        tokens = backend.asarray(np.asarray(ids, dtype=np.int32))
        return backend.to_numpy(_compiled(backend, gpt2)(model.params, tokens, config=model.config, xp=backend.xp))

    def _cache(self) -> str:
        """Read two prompts of different lengths, grow the cache, and decode one token more of each."""
        ids = self.prompts[1]
        decoder = self.model._decoder
        _, cache = decoder.prefill([ids[:-1], ids[:3]])
        cache = decoder.grow_cache(cache, min(cache.n_slots + 1, self.model.config.n_ctx))
        logits, _ = decoder.decode([ids[-1], ids[3]], cache)
        wanted = np.stack([self._logits(self.reference, row)[-1] for row in (ids, ids[:4])])
        return _far_off(self.backend.to_numpy(logits), wanted, TOLERANCE["logits", "float32"])

    def _loss(self) -> str:
        losses: list[NumpyArray] = []
        for model in (self.model, self.reference):
            backend = model.backend
            tokens = backend.asarray(np.asarray([self.prompts[1]], dtype=np.int32))
            loss = _compiled(backend, lm_loss)(model.params, tokens, config=model.config, xp=backend.xp)
            losses.append(backend.to_numpy(loss))
        mine, theirs = losses
        return _far_off(mine, theirs, TOLERANCE["logits", "float32"])

    def _sampling(self) -> str:
        """Draw tokens with every filter, from logits and noise that are the same on both sides."""
        n_rows, n_vocab = 3, 50
        random = np.random.default_rng(0)
        noise = np.stack([gumbel_noise(1, 0, row, n_vocab) for row in range(n_rows)])
        arrays = {
            "logits": random.normal(0, 3, (n_rows, n_vocab)).astype(np.float32), "noise": noise,
            "seen": random.random((n_rows, n_vocab)) < 0.2, "allowed": np.arange(n_vocab) < 45,
        }  # fmt: skip
        filters = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
        found: list[list[NumpyArray]] = []
        for backend in (self.backend, get_backend("numpy", dtype="float64")):
            placed = {name: backend.asarray(array) for name, array in arrays.items()}
            choice: Choice = backend.compile(choose, static=("top_k", "xp"))(**placed, **filters, xp=backend.xp)
            found.append([backend.to_numpy(each) for each in choice])
        for mine, theirs in zip(*found, strict=True):
            if problem := _far_off(mine, theirs, TOLERANCE["logits", "float32"]):
                return problem
        return ""

    # --- the numbers --------------------------------------------------------------------------------------------------

    def layers(self, with_cache: bool) -> list[Check]:
        """Return the error to float64 after each layer and of the logits, as `gpt-xp compare` measures it."""
        trace = worker.trace if with_cache else _trace_without_cache
        mine, theirs = ([trace(model, ids) for ids in self.prompts] for model in (self.model, self.reference))
        (layers, logits), (wanted, wanted_logits) = zip(*mine, strict=True), zip(*theirs, strict=True)
        checks = [
            _within(each.name, each.difference.relative, each.allowed)
            for each in compare_layers(list(layers), list(wanted), "float32")
        ]
        relative = difference(list(logits), list(wanted_logits)).relative
        return [*checks, _within("logits", relative, TOLERANCE["logits", "float32"])]

    def text(self, with_cache: bool) -> Check:
        """Continue a prompt greedily, and compare the text with float64's. A tie may go either way."""
        ids = self.prompts[0]
        settings: dict[str, Any] = {"max_tokens": TEXT_TOKENS, "temperature": 0.0, "ignore_eos": True}
        wanted = self.reference.generate(ids, **settings)
        try:
            found = self.model.generate(ids, **settings).token_ids if with_cache else self._greedy(ids)
        except Exception as error:
            return self._failed("text", "text", error)
        shared = shared_length(found, wanted.token_ids)
        largest = float(np.abs(self._logits(self.reference, [*ids, *wanted.token_ids])).max())
        tie = 2 * TOLERANCE["logits", "float32"] * largest
        figures: dict[str, Any] = {"with_cache": with_cache, "tokens": TEXT_TOKENS, "shared": shared}
        figures |= {"token_ids": found, "expected": wanted.token_ids}
        if shared == TEXT_TOKENS:
            return Check("text", "text", True, figures=figures)
        margin = wanted.margins[shared]
        message = (
            f"token {shared} is {found[shared]} and not {wanted.token_ids[shared]}, which was ahead by {margin:.1e} "
            f"(a tie: up to {tie:.1e})"
        )
        return Check("text", "text", margin <= tie, message, figures=figures | {"margin": margin, "tie": tie})

    def _greedy(self, ids: Sequence[int]) -> list[int]:
        """Return the likeliest continuation, with a whole forward pass for each token."""
        found: list[int] = []
        for _ in range(TEXT_TOKENS):
            found.append(int(self._logits(self.model, [*ids, *found])[-1].argmax()))
        return found

    def speed(self) -> Check:
        """Measure the tokens a second of this library and of NumPy in turn, after the text; the best of some rounds."""
        settings: dict[str, Any] = {"max_tokens": TEXT_TOKENS, "temperature": 0.0, "ignore_eos": True}
        mine: list[float] = []
        theirs: list[float] = []
        numpy = load(self._folder, backend="numpy")
        numpy.generate(self.prompts[0], **settings)
        begin = time.perf_counter()
        try:
            for _ in range(ROUNDS):
                for model, rates in ((self.model, mine), (numpy, theirs)):
                    stats = model.generate(self.prompts[0], **settings).stats
                    rates.append(stats.decode_tokens_per_second or 0.0)
                if time.perf_counter() - begin > LONG:
                    break
        except Exception as error:
            return self._failed("speed", "speed", error)
        figures = {"tokens_per_second": max(mine), "numpy_tokens_per_second": max(theirs)}
        return Check("speed", "speed", True, figures=figures)

    # --- the library's compiler ---------------------------------------------------------------------------------------

    def jit(self) -> Check:
        """Trace the forward pass as a function of arrays, and call it with other tokens than it was traced with."""
        backend, model, ids = self.backend, self.model, self.prompts[1]
        weights = leaves(model.params)

        def forward(tokens: Array, *weights: Array) -> Array:
            rest = iter(weights)
            return gpt2(tree_map(lambda _: next(rest), model.params), tokens, model.config, backend.xp)

        try:
            assert self._jit is not None
            jitted = self._jit(forward)
            for row in (ids, ids[::-1]):
                tokens = backend.asarray(np.asarray(row, dtype=np.int32))
                found = backend.to_numpy(jitted(tokens, *weights))
                if problem := _far_off(found, self._logits(model, row), TOLERANCE["same", "float32"]):
                    return Check("jit", "jit", False, f"the traced forward pass differs from the plain one: {problem}")
        except Exception as error:
            return self._failed("jit", "jit", error)
        return Check("jit", "jit", True)


def short(error: Exception) -> str:
    """Return an error in one line that is not too long."""
    text = one_line(error)
    return text if len(text) <= SHORTENED else text[:SHORTENED] + "..."


def _compiled(backend: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = backend.compile(function, static=STATIC)
    return compiled


def _trace_without_cache(model: Model, ids: Sequence[int]) -> tuple[NumpyArray, NumpyArray]:
    """Return what `comparison.worker.trace` returns, computed in one forward pass without a cache."""
    backend = model.backend
    tokens = backend.asarray(np.asarray([ids], dtype=np.int32))
    step = _compiled(backend, worker.traced)
    layers, logits, _ = step(model.params, tokens, None, len(ids), config=model.config, xp=backend.xp)
    return np.stack([backend.to_numpy(each) for each in layers]), backend.to_numpy(logits)


def _within(name: str, relative: float, allowed: float) -> Check:
    is_ok = relative <= allowed
    message = "" if is_ok else f"it differs by {relative:.1e} of the largest number (allowed: {allowed:.1e})"
    return Check(name, "layer", is_ok, message, relative=relative, allowed=allowed, figures={"computed": True})


def _far_off(found: NumpyArray, wanted: NumpyArray, allowed: float) -> str:
    """Return how the numbers differ, or "" if they are equal within the tolerance."""
    if found.shape != wanted.shape:
        return f"it returned the shape {list(found.shape)}, and {list(wanted.shape)} was expected"
    if wanted.dtype.kind != "f":
        return "" if np.array_equal(found, wanted) else f"it returned {_excerpt(found)}, and not {_excerpt(wanted)}"
    if not wanted.any():
        return "" if not found.any() else f"it returned {_excerpt(found)}, and not zeros"
    relative = difference([found], [wanted]).relative
    return "" if relative <= allowed else f"it differs by {relative:.1e} of the largest number (allowed: {allowed:.0e})"


def _excerpt(array: NumpyArray) -> str:
    return f"{array.ravel()[:8].tolist()}"


def _find_function(name: str) -> Callable[..., Any]:
    """Import the function that `--jit` names."""
    module, _, function = name.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(f"there is no function {name!r}: {error}") from None
    return found
