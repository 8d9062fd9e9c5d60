"""A decode step of CuPy as a CUDA graph: hundreds of launches from Python become one.

Never run on a GPU so far, and therefore mistrusted: a graph is used only after one step through it has given the
logits of the same step without it, and until then the cache is put back as it was. Where anything goes wrong, steps
run without a graph from then on, and a warning says why. `GPT_XP_CUPY_GRAPH=0` turns it off.

What a graph reads and writes is fixed when it is captured: the addresses of all arrays and every number of the host's.
So the token and the position are copied into arrays of the graph's own, arrays made on the way come from a pool of
memory that is the graph's alone, and another cache or window needs another graph.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from gpt_xp._typing import Array, Namespace, Params
from gpt_xp.cache import KVCache
from gpt_xp.tolerances import TOLERANCE
from gpt_xp_backends.cupy_kernels import ROWS

Step = Callable[..., tuple[Array, KVCache]]


class Trust:
    """Whether steps are captured, for all functions of a backend; `problem` says why they are not."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem

    def lose(self, problem: str) -> None:
        """Capture and replay no more."""
        self.problem = problem = problem.partition("\n")[0]  # a compiler has more to say
        warnings.warn(
            f"decoding on CuPy goes on without a CUDA graph, and slower: {problem} (GPT_XP_CUPY_GRAPH=0 does not try)",
            RuntimeWarning,
            stacklevel=2,
        )


class Graph:
    """One step for certain arrays: at first only which, then captured, then trusted."""

    def __init__(self, params: Params, tokens: Array, cache: KVCache, static: Any) -> None:
        self._params, self._start, self._static = params, cache.start, (tokens.shape, static)
        # Not kept alive: the cache of a generation is the largest array there is, and goes when that ends.
        self._k, self._v = weakref.ref(cache.k), weakref.ref(cache.v)
        self.captured: Any = None
        self.trusted = False

    def is_for(self, params: Params, tokens: Array, cache: KVCache, static: Any) -> bool:
        """Whether it reads and writes these very arrays, and was made with these settings."""
        same = params is self._params and cache.start is self._start
        return same and cache.k is self._k() and cache.v is self._v() and (tokens.shape, static) == self._static

    def capture(self, cupy: Any, step: Step, tokens: Array, cache: KVCache) -> None:
        """Run `step(cache, tokens)` once, which writes into the cache, and capture it."""
        self._tokens = tokens.copy()
        self._position = cupy.full((), cache.position, dtype=cupy.int32)
        own = cache._replace(position=self._position)
        cupy.cuda.runtime.deviceSynchronize()  # the stream below does not wait for the one that made the arrays
        self._pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(self._pool.malloc), stream:
            step(own, self._tokens)  # compiles and loads all kernels, and fills the pool
            stream.synchronize()
            stream.begin_capture()
            try:
                self._logits, _ = step(own, self._tokens)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one that says why
                    stream.end_capture()
                raise
            self.captured = stream.end_capture()

    def replay(self, tokens: Array, position: int) -> Array:
        """Run the step for tokens [batch, 1] at `position`; return its logits [batch, n_vocab]."""
        self._tokens[...] = tokens
        self._position.fill(position)
        self.captured.launch()
        return self._logits.copy()


class GraphedStep:
    """`function(params, tokens, cache, ..., xp=)` -> (logits, cache), by a graph where it decodes one token a row.

    The first step with a cache is taken as it is. So is the second, which is captured before, and the third, whose
    logits are compared with those of a replay. All later ones are replayed.
    """

    def __init__(self, cupy: Any, function: Step, xp: Namespace, thin: Namespace, trust: Trust) -> None:
        # `thin` is `xp` with a `matmul` that can be captured, and few launches for all the rest.
        self._cupy, self._function, self._xp, self._thin, self._trust = cupy, function, xp, thin, trust
        self._graph: Graph | None = None

    def __call__(
        self, params: Params, tokens: Array, cache: KVCache, *rest: Any, xp: Namespace, **options: Any
    ) -> tuple[Array, KVCache]:
        """Return what the function does."""

        def step(cache: KVCache, tokens: Array, xp: Namespace) -> tuple[Array, KVCache]:
            return self._function(params, tokens, cache, *rest, xp=xp, **options)

        plain = xp is self._xp and isinstance(cache.position, int)  # not with quantized weights
        if self._trust.problem or not plain or tokens.shape[1] != 1 or tokens.shape[0] > ROWS:
            return step(cache, tokens, xp)
        graph = self._graph
        if graph is None or not graph.is_for(params, tokens, cache, (rest, options)):
            self._graph = Graph(params, tokens, cache, (rest, options))
            return step(cache, tokens, xp)
        if graph.trusted:
            return graph.replay(tokens, cache.position), cache._replace(position=cache.position + 1)
        replayed = self._try(graph, functools.partial(step, xp=self._thin), tokens, cache)
        logits, after = step(cache, tokens, xp)  # last, so that the cache is what this makes of it
        if replayed is not None:
            graph.trusted = self._agree(replayed, logits, str(cache.k.dtype))
        return logits, after

    def _try(self, graph: Graph, step: Step, tokens: Array, cache: KVCache) -> Array | None:
        """Capture, or replay what is captured and return its logits. The cache is put back as it was."""
        before = None
        try:
            before = cache.k.copy(), cache.v.copy()
            if graph.captured:
                return graph.replay(tokens, cache.position)
            graph.capture(self._cupy, step, tokens, cache)
        except Exception as error:  # whatever it is: a step without a graph can still be taken
            self._trust.lose(f"{type(error).__name__}: {error}")
        finally:
            if before:
                self._cupy.cuda.runtime.deviceSynchronize()  # what was captured or failed had a stream of its own
                cache.k[...], cache.v[...] = before
        return None

    def _agree(self, replayed: Array, logits: Array, dtype: str) -> bool:
        error, largest = float(abs(replayed - logits).max()), float(abs(logits).max())
        if error <= TOLERANCE["logits", dtype] * largest:
            return True
        self._trust.lose(f"its logits differ by {error:.1e}, and the largest is {largest:.1e}")
        return False
