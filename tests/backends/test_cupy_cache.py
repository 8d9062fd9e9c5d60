"""CuPy's caches: each is kept for the next generation, and grows in place."""

import contextlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCuPy, arrays_of, same, small
from gpt_xp_backends.cupy_backend import CuPyBackend, adapter
from gpt_xp_backends.numpy_backend import namespace
from libraries import make_backend
from small_models import CONFIGS, small_tokens

from gpt_xp import kv_cache
from gpt_xp.kv_cache import KVCache

TOKENS = small_tokens("prime")[0].tolist()
PRIME = CONFIGS["prime"], np.ones(1, dtype=np.float32)
ONE_ROW = np.zeros(1, dtype=np.int32)


def filled(cache: KVCache, value: float = np.nan) -> KVCache:
    for x in arrays_of(cache):
        x[...] = value
    return cache


def test_what_a_cache_held_before_changes_nothing(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    cache = filled(backend.new_cache(*PRIME, 37, ONE_ROW))
    address = cache.layers[0][0].ctypes.data
    used = backend.new_cache(*PRIME, 37, ONE_ROW)
    assert used.layers[0][0].ctypes.data != address, "it is in use"
    filled(used)
    address = used.layers[0][0].ctypes.data
    del cache
    del used
    again = backend.new_cache(*PRIME, 11, ONE_ROW)
    assert again.layers[0][0].ctypes.data == address
    assert all((x == 0).all() for x in arrays_of(again))
    filled(again, 3)
    again = backend.grow_cache(again, 23)
    for x in arrays_of(again):
        assert x.shape[1] == 23
        assert (x[:, :11] == 3).all()
        assert (x[:, 11:] == 0).all()


def test_a_longer_cache_is_made_when_the_kept_one_is_gone(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, original, alive = CuPyBackend(), kv_cache.new_cache, []
    kept = [weakref.ref(x.base) for x in arrays_of(backend.new_cache(*PRIME, 11, ONE_ROW))]

    def new_cache(*args: Any) -> KVCache:
        alive.append(sum(each() is not None for each in kept))
        return original(*args)

    monkeypatch.setattr(kv_cache, "new_cache", new_cache)
    backend.new_cache(*PRIME, 7, ONE_ROW)
    assert alive == [], "it fits"
    backend.new_cache(*PRIME, 23, ONE_ROW)
    assert alive == [0]


def test_a_cache_that_grows_is_never_there_twice(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    xp = namespace()
    monkeypatch.setattr(adapter, "_namespace", lambda cupy: xp)
    backend = CuPyBackend()
    cache = filled(backend.new_cache(*PRIME, 11, ONE_ROW), 3)
    old, alive, concat = [weakref.ref(x.base) for x in arrays_of(cache)], [], xp.concat

    def watched(arrays: Any, axis: int) -> Any:
        alive.append(sum(each() is not None for each in old))
        return concat(arrays, axis=axis)

    monkeypatch.setattr(xp, "concat", watched)
    cache = backend.grow_cache(cache, 23)
    assert alive == [4, 4, 2, 2], "each layer's arrays are freed when it has longer ones"
    assert not any(each() is not None for each in old)
    assert all((x[:, :11] == 3).all() and (x[:, 11:] == 0).all() for x in arrays_of(cache))
    # The arrays are kept for the next, and grow in place as far as they go.
    addresses = [x.ctypes.data for x in arrays_of(cache)]
    del cache
    cache = backend.grow_cache(backend.new_cache(*PRIME, 7, ONE_ROW), 23)
    assert [x.ctypes.data for x in arrays_of(cache)] == addresses
    assert len(alive) == 4


def test_a_cache_whose_arrays_are_not_the_kept_ones_grows_by_itself(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    first, second = (filled(backend.new_cache(*PRIME, 11, ONE_ROW), value) for value in (3, 5))
    fork = second.copy(backend.xp)
    for cache, value in ((first, 3), (fork, 5), (second, 5)):
        grown = backend.grow_cache(cache, 23)
        filled(backend.new_cache(*PRIME, 23, ONE_ROW))
        for x in arrays_of(grown):
            assert (x[:, :11] == value).all()
            assert (x[:, 11:] == 0).all()


class Full(np.ndarray):
    """The array of a cache that fits the device once."""

    def copy(self, order: Any = "C") -> Any:
        raise MemoryError("out of memory")


def with_arrays(cache: KVCache, kind: type[np.ndarray]) -> KVCache:
    return cache._replace(layers=[(k.view(kind), v.view(kind)) for k, v in cache.layers])


def test_where_a_copy_of_the_cache_does_not_fit_the_text_is_the_plain_one(cupy: FakeCuPy) -> None:
    backend = CuPyBackend()
    full = backend.replace(new_cache=lambda *args: with_arrays(CuPyBackend.new_cache(backend, *args), Full))
    model = small(full)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, and slower: MemoryError: out of memory"):
        out = model.generate(TOKENS[:5], max_tokens=9)
    assert cupy.log == 8 * ["step"], "no step is captured"
    same(out, small(make_backend("numpy")).generate(TOKENS[:5], max_tokens=9))


def test_generations_that_begin_at_once_have_a_cache_each(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, meeting = CuPyBackend(), threading.Barrier(2)

    class Slow(np.ndarray):
        def fill(self, value: Any) -> None:  # until the other thread has looked too
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.2)
            super().fill(value)

    original = kv_cache.new_cache
    monkeypatch.setattr(kv_cache, "new_cache", lambda *args: with_arrays(original(*args), Slow))
    backend.new_cache(*PRIME, 37, ONE_ROW)  # kept, and free
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: backend.new_cache(*PRIME, 37, ONE_ROW), range(2))
    pairs = zip(arrays_of(one), arrays_of(other), strict=True)
    assert not any(np.may_share_memory(*pair) for pair in pairs)
