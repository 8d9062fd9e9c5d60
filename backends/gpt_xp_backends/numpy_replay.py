"""A step of few tokens on NumPy, as in decoding, as a list of calls: recorded once, and from then on only played.

A step is a few hundred calls of NumPy on small arrays. The weights that are read between them push the interpreter's
code and data out of the processor's caches, so that Python between two calls - frames of `model.py`, shapes, new
arrays - takes longer than the calls. What is played has none of it: each call has its arrays already, and writes where
the next one reads.

So all arrays stay where they are. The token, its position, what it may look at and its slot in the cache are put in
their places before a step is played. Other params, another cache, or more of its slots to look at, need another
recording.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from gpt_xp.kv_cache import KVCache
from gpt_xp.types import Array, Namespace, Params
from gpt_xp_backends.capture import StandIn

NumPyArray: TypeAlias = np.ndarray[Any, Any]
Step: TypeAlias = Callable[..., tuple[Any, KVCache]]
# (x, w, an array for their product) -> what writes the product there, as often as it is called
Product: TypeAlias = Callable[[NumPyArray, Any, NumPyArray], Callable[[], object]]


class Memory:
    """An array that later calls may use again once nobody holds this: neither what was computed there nor a view."""

    def __init__(self, array: NumPyArray, free: list[NumPyArray]) -> None:
        self.array, self._free = array, free

    def __del__(self) -> None:
        self._free.append(self.array)


class Recorded(StandIn):
    """What `model.py` sees of an array whose numbers change from step to step, and whose place does not."""

    __slots__ = ("_memory", "_tape", "array")

    def __init__(self, array: NumPyArray, tape: "Tape", memory: object = None) -> None:
        self.array, self._tape, self._memory = array, tape, memory

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def view(self, array: NumPyArray) -> "Recorded":
        """Return the same numbers in another shape, or some of them."""
        return Recorded(array, self._tape, self._memory)

    def __getitem__(self, index: Any) -> "Recorded":
        seen = self.array[index]
        assert np.may_share_memory(seen, self.array), "an index other than numbers and slices copies, and only once"
        return self.view(seen)

    def __invert__(self) -> "Recorded":
        return self._tape.call(np.invert, self)

    def __add__(self, other: Any) -> "Recorded":
        return self._tape.call(np.add, self, other)

    def __radd__(self, other: Any) -> "Recorded":
        return self._tape.call(np.add, other, self)

    def __sub__(self, other: Any) -> "Recorded":
        return self._tape.call(np.subtract, self, other)

    def __mul__(self, other: Any) -> "Recorded":
        return self._tape.call(np.multiply, self, other)

    def __rmul__(self, other: Any) -> "Recorded":
        return self._tape.call(np.multiply, other, self)

    def __truediv__(self, other: Any) -> "Recorded":
        return self._tape.call(np.divide, self, other)


class Tape:
    """The calls of a step, and the arrays that they pass on to each other."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self._free: dict[Any, list[NumPyArray]] = defaultdict(list)

    def place(self, like: NumPyArray) -> Recorded:
        """Return an array of that shape, layout and dtype, which nobody holds."""
        free = self._free[like.shape, like.strides, like.dtype]
        memory = Memory(free.pop() if free else np.empty_like(like), free)
        return Recorded(memory.array, self, memory)

    def add(self, call: Callable[[], object]) -> None:
        """Make a call, and note it."""
        call()
        self.calls.append(call)

    def call(self, function: Callable[..., Any], *inputs: Any) -> Recorded:
        """Call a function of NumPy that takes an array to write to as its last argument."""
        arrays = [_array(each) for each in inputs]
        result = self.place(np.asarray(function(*arrays)))
        self.add(partial(function, *arrays, result.array))
        return result

    def copy(self, x: NumPyArray, dtype: Any = None) -> Recorded:
        """Copy an array, in another dtype if one is given."""
        result = self.place(np.empty(x.shape, dtype or x.dtype))
        self.add(partial(np.copyto, result.array, x, casting="unsafe"))
        return result


def _array(x: Any) -> Any:
    return x.array if isinstance(x, Recorded) else x


class Recording:
    """The namespace `xp`, of which functions of recorded arrays are noted; `product` is its `matmul`.

    It also holds what is put in its place before each step: positions, what may be looked at, and the first slot.
    """

    def __init__(
        self, xp: Namespace, product: Product, tape: Tape, positions: NumPyArray, visible: NumPyArray, slot: int
    ) -> None:
        self._xp, self._product, self._tape = xp, product, tape
        self.positions, self.visible, self._slot = Recorded(positions, tape), Recorded(visible, tape), [slot]

    def put(self, positions: NumPyArray, visible: NumPyArray, slot: int) -> None:
        """Put in its place what another step begins with."""
        self.positions.array[...] = positions
        self.visible.array[...] = visible
        self._slot[0] = slot

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._xp, name)
        return partial(self._other, value) if callable(value) and not isinstance(value, type) else value

    def _other(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call any other function; its result is copied to where the next call looks for it."""
        if not any(isinstance(each, Recorded) for each in args):
            return function(*args, **kwargs)
        arrays = [_array(each) for each in args]
        result = self._tape.place(function(*arrays, **kwargs))
        out = result.array  # a tape that held what holds it would be kept until Python's collector comes by
        self._tape.add(lambda: np.copyto(out, function(*arrays, **kwargs)))
        return result

    def matmul(self, x: Recorded, w: Any) -> Recorded:
        """The product of two arrays, or with a quantized weight."""
        result = self._tape.place(np.empty((*x.shape[:-1], w.shape[-1]), x.dtype))
        self._tape.add(self._product(x.array, _array(w), result.array))
        return result

    def exp(self, x: Recorded) -> Recorded:
        """e to the power of each element."""
        return self._tape.call(np.exp, x)

    def sqrt(self, x: Recorded) -> Recorded:
        """The square root of each element."""
        return self._tape.call(np.sqrt, x)

    def tanh(self, x: Recorded) -> Recorded:
        """The hyperbolic tangent of each element."""
        return self._tape.call(np.tanh, x)

    def max(self, x: Recorded, *, axis: int, keepdims: bool) -> Recorded:
        """The largest element of each row."""
        return self._reduced(np.maximum, x, axis, keepdims)

    def sum(self, x: Recorded, *, axis: int, keepdims: bool) -> Recorded:
        """The sum of each row."""
        return self._reduced(np.add, x, axis, keepdims)

    def mean(self, x: Recorded, *, axis: int, keepdims: bool) -> Recorded:
        """The mean of each row."""
        total: Recorded = self.sum(x, axis=axis, keepdims=keepdims)
        return total / int(x.shape[axis])

    def _reduced(self, function: np.ufunc, x: Recorded, axis: int, keepdims: bool) -> Recorded:
        reduce = partial(function.reduce, x.array, axis=axis, keepdims=keepdims)
        result = self._tape.place(reduce())
        self._tape.add(partial(reduce, out=result.array))
        return result

    def astype(self, x: Recorded, dtype: Any, *, copy: bool = True) -> Recorded:
        """Change the dtype."""
        return x if x.dtype == dtype and not copy else self._tape.copy(x.array, dtype)

    def reshape(self, x: Recorded, shape: tuple[int, ...]) -> Recorded:
        """Return the numbers in another shape: a view, or where that cannot be, a copy."""
        seen = x.array.reshape(shape)
        if np.may_share_memory(seen, x.array):
            return x.view(seen)
        copied = self._tape.copy(x.array)
        return copied.view(copied.array.reshape(shape))

    def permute_dims(self, x: Recorded, axes: tuple[int, ...]) -> Recorded:
        """Return a view of the array with its axes in another order."""
        return x.view(x.array.transpose(axes))

    def write(self, layer: NumPyArray, new: Recorded) -> None:
        """Write the keys or values [batch, n_head, n_seq, d_head] of the tokens into one layer of the cache."""
        tokens, n_seq, slot = new.array, new.shape[2], self._slot

        def put() -> None:
            layer[:, :, slot[0] : slot[0] + n_seq] = tokens

        self._tape.add(put)


class RecordedCache(KVCache):
    """A cache that leaves what differs from step to step to the recording."""

    def positions(self, n_seq: int, n_ctx: int, xp: Namespace) -> Array:
        """The positions of the tokens."""
        return xp.positions

    def visible(self, n_seq: int, window: int | None, xp: Namespace) -> Array:
        """Which slots they may look at."""
        return xp.visible

    def write(self, layer: int, k: Array, v: Array, xp: Namespace) -> "RecordedCache":
        """Put the keys and values of the tokens into one layer."""
        xp.write(self.k[layer], k)
        xp.write(self.v[layer], v)
        return self


class Borrowed:
    """The memory of an array that is not kept alive: that of a cache goes with its generation."""

    def __init__(self, array: NumPyArray) -> None:
        self.__array_interface__ = array.__array_interface__


class Recorder:
    """A step for certain arrays: at first only which, then recorded, and recorded anew for other settings."""

    def __init__(self, params: Params, tokens: NumPyArray, cache: KVCache) -> None:
        self._params, self._start, self._tokens = params, cache.start, tokens.copy()
        self._k, self._v = weakref.ref(cache.k), weakref.ref(cache.v)
        self._recorded: Any = None, None

    def is_for(self, params: Params, tokens: NumPyArray, cache: KVCache) -> bool:
        """Whether it reads and writes these very arrays."""
        same = params is self._params and cache.start is self._start and tokens.shape == self._tokens.shape
        return same and cache.k is self._k() and cache.v is self._v()

    def run(
        self, step: Step, product: Product, tokens: NumPyArray, cache: KVCache, xp: Namespace, settings: Any
    ) -> Any:
        """Play the step for these tokens, or record it; return its result, and by how much the cache advances."""
        (rest, options), n_seq = settings, tokens.shape[1]
        positions = cache.positions(n_seq, options["config"].n_ctx, xp)
        visible = cache.visible(n_seq, options["window"], xp)
        slot = cache.position % cache.n_slots
        self._tokens[...] = tokens
        known, recorded = self._recorded
        if known == settings:
            places, calls, result = recorded
            places.put(positions, visible, slot)
            for call in calls:
                call()
        else:
            places = Recording(xp, product, tape := Tape(), positions, visible, slot)
            k, v = np.asarray(Borrowed(cache.k)), np.asarray(Borrowed(cache.v))
            own, recorded_tokens = RecordedCache(k, v, 0, cache.start), Recorded(self._tokens, tape)
            result, after = step(self._params, recorded_tokens, own, *rest, xp=places, **options)
            result = _arrays(result), after.position
            self._recorded = settings, (places, tape.calls, result)  # at once: Ctrl-C may come at any time
        arrays, advanced = result
        return [*map(np.array, arrays)] if isinstance(arrays, list) else np.array(arrays), advanced


def _arrays(result: Any) -> Any:
    return [*map(_array, result)] if isinstance(result, list) else _array(result)


class ReplayedStep:
    """`function(params, tokens, cache, ..., config=, window=, xp=)` -> (array or a list of them, cache).

    The first step with a cache is taken as it is, the second is recorded, and all later ones are played.
    """

    def __init__(self, function: Step, product: Product) -> None:
        self._function, self._product = function, product
        self._local = threading.local()  # two of Python's threads may decode at once, each with arrays of its own

    def __call__(
        self, params: Params, tokens: NumPyArray, cache: KVCache, *rest: Any, xp: Namespace, **options: Any
    ) -> tuple[Array, KVCache]:
        """Return what the function does."""
        recorder: Recorder | None = getattr(self._local, "recorder", None)
        is_known = recorder is not None and recorder.is_for(params, tokens, cache)
        if not is_known:
            self._local.recorder = Recorder(params, tokens, cache)
        fits = cache.position % cache.n_slots + tokens.shape[1] <= cache.n_slots
        if recorder is None or not is_known or not fits:  # what does not fit, the function says
            return self._function(params, tokens, cache, *rest, xp=xp, **options)
        result, advanced = recorder.run(self._function, self._product, tokens, cache, xp, (rest, options))
        return result, cache._replace(position=cache.position + advanced)
