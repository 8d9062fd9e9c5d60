"""A decode step of CuPy as a CUDA graph: hundreds of launches from Python become one.

Never run on a GPU so far, and therefore mistrusted: the first graph of its kind is used only after one step through it
has given the logits of the same step without it, and until then the cache is put back as it was. Where anything goes
wrong, steps run without a graph from then on, and a warning says why. `GPT_XP_CUPY_GRAPH=0` turns it off.

What a graph reads and writes is fixed when it is captured: the addresses of all arrays and every number of the host's.
So the tokens, the position and the start of each row are copied into arrays of the graph's own, arrays made on the way
come from a pool of memory that is the graph's alone, and another cache or window needs another graph. The arrays of a
cache are kept for the next generation, which then finds its graphs.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

from gpt_xp.config import GPT2Config
from gpt_xp.kv_cache import KVCache, new_cache
from gpt_xp.tolerances import TOLERANCE
from gpt_xp.types import Array, Namespace, Params
from gpt_xp_backends.capture import Trust
from gpt_xp_backends.cupy_kernels import ROWS, address

Step = Callable[..., tuple[Array, KVCache]]


class KeptCache:
    """The arrays of the last cache. The next one of the same size is made of them if they are free by then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # Two generations that begin at once must not have the same arrays.
        self._kind: Any = None
        self._kept: tuple[Array, Array] | None = None
        self._users: tuple[Callable[[], Array | None], ...] = ()

    def new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace) -> KVCache:
        """Return an empty cache, by the arguments of `gpt_xp.new_cache`."""
        with self._lock:
            return self._new_cache(config, like, n_slots, start, xp)

    def _new_cache(self, config: GPT2Config, like: Array, n_slots: int, start: Array, xp: Namespace) -> KVCache:
        kind = config, like.dtype, n_slots, start.shape
        if self._kept is not None and kind == self._kind and not any(user() is not None for user in self._users):
            for array in self._kept:
                array.fill(0)  # Slots that are masked are multiplied by 0, so NaN in them would show.
        else:
            self._kept = None  # Before the new ones are made: memory may not be enough for both.
            made = new_cache(config, like, n_slots, start, xp)
            self._kind, self._kept = kind, (made.k, made.v)
        k, v = (array[...] for array in self._kept)  # These views end with the generation.
        self._users = weakref.ref(k), weakref.ref(v)
        return KVCache(k, v, 0, start)


class Graph:
    """One step, captured for certain arrays."""

    def __init__(self, params: Params, tokens: Array, cache: KVCache, static: Any) -> None:
        self.kind = tokens.shape, cache.k.shape, str(cache.k.dtype), static
        self.trusted = False
        self._params = params
        # Not kept alive: a cache is the largest array there is.
        self._k, self._v = weakref.ref(_whole(cache.k)), weakref.ref(_whole(cache.v))
        self._addresses = address(cache.k), address(cache.v)
        self._latest_start: Array = None
        self._captured: Any = None
        self._logits: Array = None

    def __del__(self) -> None:
        # A pool of CuPy 14 and its free blocks hold each other, and Python's collector does not see it: what is not
        # given back here is lost until the process ends.
        if pool := self.__dict__.pop("_pool", None):
            self._captured = self._logits = None
            with contextlib.suppress(Exception), self._device:  # At the end of the process CUDA may be gone.
                pool.free_all_blocks()  # It frees those of the current device.

    def is_for(self, params: Params, tokens: Array, cache: KVCache, static: Any) -> bool:
        """Whether it reads and writes these very arrays, and was made with these settings."""
        same = params is self._params and _whole(cache.k) is self._k() and _whole(cache.v) is self._v()
        same = same and self._addresses == (address(cache.k), address(cache.v))
        return same and (tokens.shape, cache.k.shape, static) == (*self.kind[:2], self.kind[3])

    def is_alive(self) -> bool:
        """Whether there can be another step with its cache."""
        return self._k() is not None and self._v() is not None

    def capture(
        self, cupy: Any, step: Step, tokens: Array, cache: KVCache, cache_type: type[KVCache] = KVCache
    ) -> Array:
        """Run `step(cache, tokens)` once, which writes into the cache, and capture it; return the logits of the run.

        The cache that it is given has the same arrays, and is a `cache_type`.
        """
        self._tokens, self._start = tokens.copy(), cache.start.copy()
        self._position = cupy.full((), cache.position, dtype=cupy.int32)
        own = cache_type(cache.k, cache.v, self._position, self._start)
        self._latest_start = cache.start
        cupy.cuda.runtime.deviceSynchronize()  # the stream below does not wait for the one that made the arrays
        self._device = cupy.cuda.Device()
        self._pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(self._pool.malloc), stream:
            made = step(own, self._tokens)[0]  # compiles and loads all kernels, and fills the pool
            stream.synchronize()
        logits = made.copy()  # out of the pool, which has then all that the capture takes
        del made
        with cupy.cuda.using_allocator(self._pool.malloc), stream:
            try:
                stream.begin_capture()
                self._logits = step(own, self._tokens)[0]
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one that says why
                    stream.end_capture()
                raise
            self._captured = stream.end_capture()
        return logits

    def replay(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Run the step for tokens [batch, 1]; return its logits [batch, n_vocab], and the cache with one token more."""
        self._tokens[...] = tokens
        self._position.fill(cache.position)
        if cache.start is not self._latest_start:  # It is another generation.
            self._start[...] = self._latest_start = cache.start
        self._captured.launch()
        return self._logits.copy(), cache._replace(position=cache.position + 1)


class GraphedStep:
    """`function(params, tokens, cache, ..., xp=)` -> (logits, cache), by a graph where it decodes one token a row.

    The first step with a cache is captured, and later ones are replayed. The first graph of its kind is compared first:
    its first two steps are taken without it, and the logits of the second are those to which it is held.
    """

    def __init__(
        self,
        cupy: Any,
        function: Step,
        xp: Namespace,
        thin: Namespace,
        trust: Trust,
        cache_type: type[KVCache] = KVCache,
    ) -> None:
        # `thin` is `xp` with a `matmul` that can be captured, and few launches for all the rest.
        self._cupy, self._function, self._xp, self._thin, self._trust = cupy, function, xp, thin, trust
        self._cache_type = cache_type
        self._graphs: list[Graph] = []

    def __call__(
        self, params: Params, tokens: Array, cache: KVCache, *rest: Any, xp: Namespace, **options: Any
    ) -> tuple[Array, KVCache]:
        """Return what the function does."""

        def plain(cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
            return self._function(params, tokens, cache, *rest, xp=xp, **options)

        def thin(cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
            return self._function(params, tokens, cache, *rest, xp=self._thin, **options)

        can_be_captured = xp is self._xp and isinstance(cache.position, int)  # not with quantized weights
        if self._trust.problem or not can_be_captured or tokens.shape[1] != 1 or tokens.shape[0] > ROWS:
            return plain(cache, tokens)
        static = rest, tuple(sorted(options.items()))
        graph = next((each for each in self._graphs if each.is_for(params, tokens, cache, static)), None)
        if graph is None:
            return self._capture(Graph(params, tokens, cache, static), thin, plain, tokens, cache)
        if graph.trusted:
            return graph.replay(tokens, cache)
        return self._compare(graph, plain, tokens, cache)

    def _capture(self, graph: Graph, thin: Step, plain: Step, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Take a step, and capture it: where a graph of its kind was right before, by the run before the capture."""
        self._graphs = [each for each in self._graphs if each.is_alive()]
        graph.trusted = (self._function, graph.kind) in self._trust.agreed
        with self._trying(cache) as keep_copy:
            if not graph.trusted:
                keep_copy()
            logits = graph.capture(self._cupy, thin, tokens, cache, self._cache_type)
            self._graphs.append(graph)
            if graph.trusted:
                return logits, cache._replace(position=cache.position + 1)
        return plain(cache, tokens)

    def _compare(self, graph: Graph, plain: Step, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Take a step without the graph, and trust the graph if it gives the same logits."""
        replayed = None
        with self._trying(cache) as keep_copy:
            keep_copy()
            replayed, _ = graph.replay(tokens, cache)
        logits, after = plain(cache, tokens)  # last, so that the cache is what this makes of it
        if replayed is not None:
            error, largest = float(abs(replayed - logits).max()), float(abs(logits).max())
            graph.trusted = error <= TOLERANCE["logits", str(cache.k.dtype)] * largest
            if graph.trusted:
                self._trust.agreed.add((self._function, graph.kind))
            else:
                self._graphs = []
                self._trust.lose(f"its logits differ by {error:.1e}, and the largest is {largest:.1e}")
        return logits, after

    @contextlib.contextmanager
    def _trying(self, cache: KVCache) -> Any:
        """Lose trust instead of failing. Of what it yields a call copies the cache, which is put back at the end."""
        before: list[Array] = []

        def keep_copy() -> None:
            before[:] = cache.k.copy(), cache.v.copy()

        try:
            yield keep_copy
        except Exception as error:  # whatever it is: a step without a graph can still be taken
            self._graphs = []
            self._trust.lose(f"{type(error).__name__}: {error}", error)
        finally:
            if before:
                self._cupy.cuda.runtime.deviceSynchronize()  # what was captured or failed had a stream of its own
                cache.k[...], cache.v[...] = before


def _whole(x: Array) -> Array:
    """Return the array that has the memory of a view."""
    return x if x.base is None else x.base
