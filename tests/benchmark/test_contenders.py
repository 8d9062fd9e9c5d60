"""gpt-xp's own contenders in `gpt-xp bench`: what is timed, and the floor."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpt_xp_backends import jax_backend
from libraries import make_backend

from gpt_xp import Model
from gpt_xp.benchmark import contenders
from gpt_xp.benchmark.contenders import FLOOR_CHUNK
from gpt_xp.benchmark.figures import Workload
from gpt_xp.generation.loop import BLOCK_STEPS
from gpt_xp.hub.find import find_model


def test_a_step_lasts_until_all_rows_have_their_token(monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)

    def stream(prompts: list[list[int]], **settings: Any):
        assert settings == {"max_tokens": 4, "ignore_eos": True, "seed": 0, "temperature": 0.7}
        for seconds in (7.0, 1.0, 2.0, 3.0):
            clock.now += seconds
            for _ in prompts:
                clock.now += 0.25
                yield "a piece"
        yield "a result"

    contender = contenders.GptXp("shakespeare", "numpy", sampling={"temperature": 0.7})
    contender._model = SimpleNamespace(stream=stream, backend=SimpleNamespace(decode_block=None))
    monkeypatch.setattr(contenders, "time", clock)
    assert contender.run([[1], [2], [3]], 4) == [7.75, 1.75, 2.75, 3.75]


@pytest.mark.parametrize(
    ("speculate", "decode_block", "n_tokens", "of_one"),
    [
        (True, None, 4, 48.0 / 3),
        (True, max, 4, 48.0 / 3),  # it takes the place of blocks
        (False, max, 4, 48.0 / 16),  # the block is computed to its end
        (False, max, 17, 48.0 / 16),
        (False, max, 18, 48.0 / 32),
    ],
)
def test_tokens_that_come_several_at_a_time_share_the_time(monkeypatch, speculate, decode_block, n_tokens, of_one):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)

    def stream(prompts: list[list[int]], **settings: Any):
        for seconds in (7.0, 48.0, *[0.0] * (n_tokens - 2)):
            clock.now += seconds
            yield "a piece"

    contender = contenders.GptXp("shakespeare", "numpy", sampling={"speculate": speculate})
    contender._model = SimpleNamespace(stream=stream, backend=SimpleNamespace(decode_block=decode_block))
    monkeypatch.setattr(contenders, "time", clock)
    assert BLOCK_STEPS == 16
    assert contender.run([[1]], n_tokens) == [7.0, *[of_one] * (n_tokens - 1)]


def test_jax_as_on_a_gpu_is_timed_block_by_block(monkeypatch, shakespeare: Model):
    backend = make_backend("jax")
    on_gpu = Model(shakespeare.params, shakespeare.config, backend=backend.replace(**jax_backend.on_accelerators()))
    contender = contenders.GptXp("shakespeare", "numpy")
    monkeypatch.setattr(contender, "_model", on_gpu)
    first, *later = contender.run([[1, 2, 3]], Workload(3).n_new)
    assert len(later) == BLOCK_STEPS, "the tokens after the first fill one block"
    assert first > 0
    assert len(set(later)) == 1


def test_a_quantized_model_says_so(monkeypatch, shakespeare: Model):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(contenders, "load", lambda model, **options: asked.update(options) or shakespeare)
    contender = contenders.make({"contender": "gpt-xp", "model": "m", "backend": "numpy", "quantize": "int8"})
    assert (asked["backend"].name, asked["backend"].dtype, asked["quantize"]) == ("numpy", "float32", "int8")
    assert contender.describe()["dtype"] == "int8"


def test_gpt_xp_is_the_model(shakespeare: Model):
    contender = contenders.GptXp("shakespeare", "numpy")
    assert np.array_equal(contender.logits([5, 6, 7]), shakespeare.logits([5, 6, 7])[-1])
    assert contender.describe()["dtype"] == "float32"
    seconds = contender.run([[5, 6, 7], [8, 9, 10]], 5)
    assert len(seconds) == 5
    assert min(seconds) > 0


@pytest.mark.parametrize(("batch", "context"), [(1, 3), (3, 5), (1, FLOOR_CHUNK + 5), (2, FLOOR_CHUNK + 5)])
def test_the_floor_multiplies_every_weight_and_reads_the_whole_cache(monkeypatch, shakespeare: Model, batch, context):
    """In all ways that it tries, of which the timed one is the fastest."""
    config = shakespeare.config
    linears = config.n_layer * 12 * config.n_embd**2
    table = config.n_vocab * config.n_embd
    tried: list[int] = []

    def try_all(self: contenders.Floor, name: str, ways: list[contenders.Work]) -> contenders.Work:
        for way in ways:
            counted: list[int] = []
            with monkeypatch.context() as patch:
                patch.setattr(contenders, "_multiply", lambda steps: counted.extend(map(size, steps)))  # noqa: B023
                way()
            tried.append(sum(counted))
            way()
        return ways[-1]

    def size(step: tuple[np.ndarray, ...]) -> int:
        left, right, out = step
        assert out.shape == (left.shape[0], right.shape[1])
        return left.shape[0] * left.shape[1] * right.shape[1]

    read: list[tuple[int, int]] = []
    monkeypatch.setattr(contenders.Floor, "_fastest", try_all)
    monkeypatch.setattr(contenders.Floor, "_read", lambda self, cache, rows: read.append((cache.nbytes, rows)))
    floor = contenders.Floor(str(find_model("shakespeare")))
    seconds = floor.run([[1] * context] * batch, 4)
    assert len(seconds) == 4
    assert tried == 2 * [batch * (context * linears + table)] + 2 * [batch * (linears + table)]
    one = 2 * config.n_layer * config.n_embd * 4  # bytes of keys and values of one token
    assert {n_bytes for n_bytes, _ in read} == {batch * (context + 4) * one}
    assert [rows for _, rows in read] == [batch * config.n_head * (context + step) for step in (1, 2, 3)]


def test_the_floors_products_are_products(shakespeare: Model):
    floor = contenders.Floor(str(find_model("shakespeare")))
    w = floor._linears[1]
    for make, name in ((floor._products, (3, w.shape[1], "out")), (floor._transposed_products, (w.shape[1], 3, "out"))):
        make(3, [w])()
        expected = np.broadcast_to(0.5 * w.sum(axis=0, dtype=np.float64), (3, w.shape[1]))
        out = floor._buffers[name]
        assert np.abs((out if out.shape[0] == 3 else out.T) - expected).max() < 1e-4
