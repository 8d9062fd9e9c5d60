"""Record a decode step once, and replay it.

The first step with certain arrays is traced and recorded, and later steps are replayed. A recording is fixed to the
arrays that it reads and writes, and to every number of the host. So the tokens, the position and the start of each row
are copied into arrays that belong to the recording. Another cache needs another recording.

The first recording of its kind is used only if a step through it gives the logits of the same step without it. Until
then the cache is put back. If anything goes wrong, later steps are computed without recordings, and a warning says why.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from gpt_xp.kv_cache import KVCache, LayerCache
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.types import Array, Namespace, Params

Step = Callable[..., tuple[Array, KVCache]]


class GraphGuard:
    """Decides whether steps are recorded, for all functions of a backend. `problem` says why they are not.

    The warning names `consequence` (the effect) and `switch` (the setting that turns recording off).
    """

    def __init__(self, problem: str | None, consequence: str, switch: str) -> None:
        self.problem = problem
        self.agreed: set[Any] = set()  # kinds of recordings whose logits were right
        self._consequence, self._switch = consequence, switch

    @property
    def verdict(self) -> str:
        """Return "yes" once a recording was right, "no" with the reason, or "not yet"."""
        return f"no ({self.problem})" if self.problem else "yes" if self.agreed else "not yet"

    def disable(self, problem: str, error: Exception | None = None) -> None:
        """Record and replay no more. The warning has the error as its cause, with the traceback."""
        self.problem = problem = problem.partition("\n")[0]  # A compiler has more to say.
        warning = RuntimeWarning(f"{self._consequence}: {problem} ({self._switch} does not try)")
        warning.__cause__ = error
        warnings.warn(warning, stacklevel=2)


class Recording(Protocol):
    """A step that can be run again on the same arrays, and writes its result to `output`."""

    output: Array

    def run(self) -> None:
        """Run the step."""


class Runner(Protocol):
    """Records steps of its namespace `xp` with up to `max_rows` rows."""

    xp: Namespace
    tracer: Namespace  # the namespace in which a step is traced
    max_rows: int

    def record(self, step: Callable[[], Array]) -> tuple[Array, Recording]:
        """Run a step, and record it. Return the output of the run, and the recording."""

    def address(self, x: Array) -> int:
        """Return where an array begins in memory."""

    def wait(self) -> None:
        """Wait until everything is computed."""


class TracedLayer(LayerCache):
    """A layer of the cache in a step that is traced."""

    def append(self, k: Any, v: Any, xp: Any) -> tuple["LayerCache", Any, Any]:
        """Write keys and values [batch, n_head, n_seq, d_head]; those of one token by one call if the runner has it."""
        all_k, all_v = (x.reshape((*k.shape[:2], *x.shape[1:])) for x in (self.k, self.v))
        if xp.append(all_k, all_v, self.position, k, v):
            return self, all_k, all_v
        return super().append(xp.computed(k), xp.computed(v), xp)


class TracedCache(KVCache):
    """The cache in a step that is traced. Its position is on the device."""

    def layer(self, index: int) -> TracedLayer:
        """Return the cache of one layer."""
        return TracedLayer(*self.layers[index], self.position)


class BoundStep:
    """A recording of some kind, and the arrays that it is bound to."""

    def __init__(self, runner: Runner, params: Params, tokens: Array, cache: KVCache, static: Any) -> None:
        self._runner, self._params, self._static = runner, params, (tokens.shape, static)
        arrays = _arrays(cache)
        self._layout = [self._place(x) for x in arrays]
        # No array is kept alive: a cache is the largest array there is.
        self._views = [weakref.ref(x) for x in arrays]
        self._buffers = [weakref.ref(x if x.base is None else x.base) for x in arrays]
        self.kind = *self._static, cache.n_slots, str(arrays[0].dtype)

    def _place(self, x: Array) -> tuple[Any, ...]:
        return self._runner.address(x), x.shape, x.strides

    def is_alive(self) -> bool:
        """Return whether there can be another step with its cache."""
        return all(buffer() is not None for buffer in self._buffers)

    def is_for(self, params: Params, tokens: Array, cache: KVCache, static: Any) -> bool:
        """Return whether it reads and writes these arrays, and was recorded with these settings."""
        if params is not self._params or (tokens.shape, static) != self._static:
            return False
        arrays = _arrays(cache)
        if all(view() is x for view, x in zip(self._views, arrays, strict=True)):
            return True  # To ask each array for its address and strides takes ten times as long.
        if not self.is_alive() or any(self._place(x) != place for x, place in zip(arrays, self._layout, strict=True)):
            return False
        self._views = [weakref.ref(x) for x in arrays]
        return True

    def record(self, step: Step, tokens: Array, cache: KVCache) -> Array:
        """Run `step(tokens, cache, xp)` once, which writes into the cache, and record it. Return its output."""
        runner = self._runner
        self._tokens, self._start, self._latest_start = tokens.copy(), cache.start.copy(), cache.start
        self._position = runner.xp.full((), cache.position, dtype=runner.xp.int32)
        own = TracedCache(cache.layers, self._position, self._start)
        output, self._recording = runner.record(lambda: step(self._tokens, own, runner.tracer)[0])
        return output

    def replay(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Run the step for tokens [batch, 1]; return its logits [batch, n_vocab], and the cache with one token more."""
        self._tokens[...] = tokens
        self._position.fill(cache.position)
        if cache.start is not self._latest_start:  # It is another generation.
            self._start[...] = self._latest_start = cache.start
        self._recording.run()
        return self._recording.output.copy(), cache._replace(position=cache.position + 1)


def _arrays(cache: KVCache) -> list[Array]:
    return [x for layer in cache.layers for x in layer]


class CapturedStep:
    """`function(params, tokens, cache, ..., xp=)` -> (logits, cache), replayed where it decodes one token of each row.

    The first step with a cache is recorded, and later ones are replayed. The first recording of its kind is compared:
    its first two steps are taken without it, and it must give the logits of the second.
    """

    def __init__(self, function: Step, runner: Runner, guard: GraphGuard) -> None:
        self._function, self._runner, self._guard = function, runner, guard
        self._bound: list[BoundStep] = []

    def __call__(
        self, params: Params, tokens: Array, cache: KVCache, *rest: Any, xp: Namespace, **options: Any
    ) -> tuple[Array, KVCache]:
        """Return the result of the function."""

        def step(tokens: Array, cache: KVCache, xp: Namespace = xp) -> tuple[Array, KVCache]:
            return self._function(params, tokens, cache, *rest, xp=xp, **options)

        # Other namespaces are those of quantized weights and of replaced parts.
        can_be_recorded = xp is self._runner.xp and isinstance(cache.position, int)
        (batch, n_seq), max_rows = tokens.shape, self._runner.max_rows
        if self._guard.problem or not can_be_recorded or n_seq != 1 or batch > max_rows:
            return step(tokens, cache)
        static = self._function, rest, tuple(sorted(options.items()))
        bound = next((each for each in self._bound if each.is_for(params, tokens, cache, static)), None)
        if bound is None:
            return self._record(BoundStep(self._runner, params, tokens, cache, static), step, tokens, cache)
        if bound.kind in self._guard.agreed:
            return bound.replay(tokens, cache)
        return self._compare(bound, step, tokens, cache)

    def _record(self, bound: BoundStep, step: Step, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Record a step. Return the output of its run if the kind is trusted, and of a plain step if it is not."""
        self._bound = [each for each in self._bound if each.is_alive()]
        trusted = bound.kind in self._guard.agreed
        logits = self._attempt(lambda: bound.record(step, tokens, cache), cache, restore=not trusted)
        if logits is not None:
            self._bound.append(bound)
            if trusted:
                return logits, cache._replace(position=cache.position + 1)
        return step(tokens, cache)

    def _compare(self, bound: BoundStep, step: Step, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Take a plain step, and trust the kind of the recording if it gives the same logits."""
        replayed = self._attempt(lambda: bound.replay(tokens, cache)[0], cache, restore=True)
        logits, after = step(tokens, cache)  # last, so that the cache is as this step leaves it
        if replayed is not None:
            error, largest = float(abs(replayed - logits).max()), float(abs(logits).max())
            if error <= TOLERANCE["logits", bound.kind[-1]] * largest:
                self._guard.agreed.add(bound.kind)
            else:
                self._bound = []
                self._guard.disable(f"its logits differ by {error:.1e}, and the largest is {largest:.1e}")
        return logits, after

    def _attempt(self, action: Callable[[], Array], cache: KVCache, restore: bool) -> Array | None:
        """Return the array that an action makes, or None if it fails. Put the cache back if `restore` is set."""
        before: list[tuple[Array, Array]] = []
        try:
            if restore:
                before = [(k.copy(), v.copy()) for k, v in cache.layers]
            return action()
        except Exception as error:  # After any error a plain step is still possible.
            self._bound = []
            self._guard.disable(f"{type(error).__name__}: {error}", error)
            return None
        finally:
            if before:
                self._runner.wait()  # A recording or a failed step may still run on another stream.
            for (k, v), (old_k, old_v) in zip(cache.layers, before, strict=False):
                k[...], v[...] = old_k, old_v
