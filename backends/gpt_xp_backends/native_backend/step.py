"""Runs the steps of a model as tapes: one for each shape of the tokens and of the cache."""

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace, Params
from gpt_xp_backends.captured_step import TracedCache
from gpt_xp_backends.native_backend import threads
from gpt_xp_backends.native_backend.machine import alone, kernels
from gpt_xp_backends.native_backend.packed import is_float
from gpt_xp_backends.native_backend.tape import Arena, NotTracedError, Tape
from gpt_xp_backends.native_backend.tracer import NativeTracer, host_array
from gpt_xp_backends.tracing import TracedArray

MAX_TAPES = 16  # A step keeps so many tapes, for tokens and caches of different shapes.
PATIENCE = 0.05  # seconds; a step whose kernels are compiled is traced in less


class NativeStep:
    """`function(params, tokens, cache, ..., xp)`, traced for each shape of its arguments, and run by kernels.

    What cannot be traced is computed by `plain`, the same function. `problem` then says why. While a thread
    compiles the kernels, a step with float weights is computed by `plain`, and a step with quantized weights waits for
    them. With `is_patient`, every step waits.
    """

    def __init__(
        self, function: Callable[..., Any], plain: Callable[..., Any], runner: "Runner", is_patient: bool = False
    ) -> None:
        self._function, self._plain, self._runner, self._is_patient = function, plain, runner, is_patient
        self._names = tuple(inspect.signature(function).parameters)
        self._traced: dict[Any, TracedStep] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return the result of the function."""
        given = dict(zip(self._names, args, strict=False)) | options
        params, tokens, cache, xp = (given.pop(name, None) for name in ("params", "tokens", "cache", "xp"))
        # Other namespaces replace parts of the model.
        if xp is not self._runner.xp or cache is None or not isinstance(cache.position, int):
            return self._plain(*args, **options)
        n_slots, n_seq = cache.n_slots, tokens.shape[-1]
        if cache.position < 0 or cache.position % n_slots + n_seq > n_slots:
            return self._plain(*args, **options)  # It raises the error that says so.
        with threads.LOCK:
            try:
                key = id(params), tokens.shape, cache.start.shape, n_slots, tuple(sorted(given.items()))
                step = self._traced.pop(key, None)
                if step is None or not step.is_for(params):
                    before = KVCache(list(cache.layers), cache.position, cache.start)  # NumPy may write to `layers`.
                    step = self._runner.tracing.trace(
                        (self, key),
                        lambda: TracedStep(self._function, params, tokens, before, given, self._runner),
                        waits=self._is_patient or not is_float(params),
                    )
                if step is None or not step.is_for(params):
                    return self._plain(*args, **options)
                found = step.run(tokens, cache)
            except (NotTracedError, TypeError) as error:  # Such a key cannot be compared, if it is a TypeError.
                self._runner.problem = str(error)
                return self._plain(*args, **options)
            self._traced[key] = step  # The latest is the last.
            if len(self._traced) > MAX_TAPES:
                del self._traced[next(iter(self._traced))]
            return found


class Runner:
    """The namespace, memory and threads that all steps of a backend share. `problem` is why one was not traced."""

    def __init__(self, xp: Namespace, n_threads: int, tracing: "Tracing") -> None:
        self.xp, self.arena, self.n_threads, self.problem, self.tracing = xp, Arena(), n_threads, "", tracing


class Tracing:
    """Traces steps: in a thread, while NumPy computes, where this version of the kernels has compiled nothing yet.

    The first token of a start then need not wait about a second until its kernels are compiled.
    """

    def __init__(self) -> None:
        self._coming: dict[Any, _Coming] = {}
        self._is_cold: bool | None = None

    def trace(self, key: Any, make: "Callable[[], TracedStep]", waits: bool) -> "TracedStep | None":
        """Return a traced step, or None while a thread compiles its kernels. It `waits` for them, or does not."""
        if self._is_cold is None:
            self._is_cold = not kernels().has("run_rounds")  # Every traced step needs it.
        if not self._is_cold:
            return make()
        coming = self._coming.get(key)
        if coming is None:
            coming = _Coming(make)
            try:
                coming.start()
            except RuntimeError:  # The system refuses to start a thread.
                coming.run()
                return coming.result()
            self._coming = {each: other for each, other in self._coming.items() if other.is_alive()} | {key: coming}
            coming.join(PATIENCE)
        if waits:
            coming.join()
        if coming.is_alive():
            return None
        self._coming.pop(key)
        if not coming.has_compiled and not self.is_compiling:  # Two threads must not take memory from one arena.
            self._is_cold, self._coming = False, {}
        return coming.result()

    @property
    def is_compiling(self) -> bool:
        """Whether a thread compiles kernels."""
        return any(each.is_alive() for each in list(self._coming.values()))


class _Coming(threading.Thread):
    """Traces a step. It is no daemon, because a process that ends while LLVM compiles would crash."""

    def __init__(self, make: "Callable[[], TracedStep]") -> None:
        super().__init__(name="gpt-xp native, compiling", daemon=False)
        self._make: Callable[[], TracedStep] | None = make
        self._found: TracedStep | None = None
        self._error: Exception | None = None
        self.has_compiled = True

    def run(self) -> None:
        """Trace the step, while no other thread does: all take memory from one arena."""
        assert self._make is not None
        try:
            with alone():
                before = kernels().compile_seconds
                self._found = self._make()
                self.has_compiled = kernels().compile_seconds > before
        except Exception as error:
            self._error = error
        self._make = None  # It holds the params and a cache.

    def result(self) -> "TracedStep | None":
        """Return the step, or None in a fork, which has no such thread. Raises what tracing raised."""
        if self._error is not None:
            raise self._error
        return self._found


class TracedStep:
    """A step for tokens and a cache of certain shapes, as a tape."""

    def __init__(
        self, function: Callable[..., Any], params: Params, tokens: Array, cache: KVCache, others: Any, runner: Runner
    ) -> None:
        self._params, self._edges = params, [*_edges(params)]  # The id of params is a key.
        self._tape = Tape(runner.arena, runner.n_threads, cache)
        tape, tracer = self._tape, NativeTracer(runner.xp, self._tape)
        self._tokens, self._start = host_array(np.array(tokens), tape), host_array(np.array(cache.start), tape)
        self._position = host_array(np.full((), cache.position, np.int32), tape)
        own = TracedCache(cache.layers, self._position, self._start)
        try:
            found = function(params=params, tokens=self._tokens, cache=own, xp=tracer, **others)
            self._result = _computed(found, tracer, cache.position)
            self._tape.prepare()
        except (TypeError, ValueError) as error:  # A `TracedArray` raises it, or NumPy, which was given one.
            raise NotTracedError(str(error)) from error

    def is_for(self, params: Params) -> bool:
        """Return whether the params still have the arrays that the tape reads."""
        return params is self._params and all(tree[key] is child for tree, key, child in self._edges)

    def run(self, tokens: Array, cache: KVCache) -> Any:
        """Run the step for tokens and a cache of the same shapes."""
        assert self._tape.cache is not None
        self._tape.cache.bind(cache)
        self._tokens[...], self._start[...] = tokens, cache.start
        self._position.fill(cache.position)
        self._tape.run()
        return _result(self._result, cache)


def _edges(tree: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each dict or list in a tree with each key and what it has there. `tree_map` takes 5 times as long."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield tree, key, child
        yield from _edges(child)


class _CacheAfter(NamedTuple):
    """Stands for the cache in a result: the one that was passed, with so many tokens more."""

    n_tokens: int


def _computed(tree: Any, tracer: NativeTracer, position: int) -> Any:
    if isinstance(tree, TracedArray):
        return tracer.computed(tree)
    if isinstance(tree, KVCache):
        return _CacheAfter(int(tree.position) - position)
    if isinstance(tree, list) or type(tree) is tuple:
        return type(tree)(_computed(each, tracer, position) for each in tree)
    raise NotTracedError(f"a step returns {type(tree).__name__}")


def _result(tree: Any, cache: KVCache) -> Any:
    if isinstance(tree, _CacheAfter):
        return KVCache(cache.layers, cache.position + tree.n_tokens, cache.start)
    if isinstance(tree, list | tuple):
        return type(tree)(_result(each, cache) for each in tree)
    return tree.copy()  # The next run writes into it.
