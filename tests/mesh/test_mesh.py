"""A model on a mesh of devices: the same numbers and the same text, in as few sums over the devices as there can be."""

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from small_models import CONFIGS, GOLDENS, leaves, small_params, small_tokens, tree_map

import gpt_xp
from gpt_xp import Backend, GPT2Config, Model
from gpt_xp.errors import GptXpWarning
from gpt_xp.generation.step_functions import decode_steps, next_token_logits
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.mesh import MeshShape, cache_bytes_on_device, params_bytes_on_device, parse_mesh
from gpt_xp.tree import leaves as weights_of

pytestmark = pytest.mark.filterwarnings("ignore:.* pads . heads:gpt_xp.errors.GptXpWarning")
Meshes = Callable[..., Backend]
PROMPTS = ["ROMEO:", "What is", "To be, or", "Enter the king"]
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 11}


# The numbers.


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(mesh_backend: Backend, name: str) -> None:
    logits = Model(small_params(name), CONFIGS[name], backend=mesh_backend).logits(small_tokens(name))
    assert_values(logits[:, ::3], GOLDENS[f"{name}/logits"], TOLERANCE["logits", "float32"])


def test_float64_logits_are_those_of_transformers(on_mesh: Meshes) -> None:
    model = Model(small_params("prime"), CONFIGS["prime"], backend=on_mesh("data=2,model=2", dtype="float64"))
    logits = model.logits(small_tokens("prime"))
    assert logits.dtype == np.float64
    assert_values(logits[:, ::3], GOLDENS["prime/logits"], TOLERANCE["logits", "float64"])


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_torch(mesh_backend: Backend, name: str) -> None:
    import jax

    backend, config = mesh_backend, CONFIGS[name]
    params = backend.place(small_params(name), config)
    loss_of = functools.partial(gpt_xp.lm_loss, config=config, xp=backend.xp)
    tokens = backend.asarray(small_tokens(name))
    loss, gradient = backend.compile(jax.value_and_grad(loss_of))(params, tokens)
    assert_values(backend.to_numpy(loss), GOLDENS[f"{name}/loss"], TOLERANCE["logits", "float32"])
    c_attn = backend.fetch(gradient, config)["blocks"][0]["attn"]["c_attn"]["w"]
    assert_values(c_attn[:, ::3], GOLDENS[f"{name}/gradient"], TOLERANCE["gradient", "float32"])


HEADS_OF_1558M = GPT2Config(n_vocab=1023, n_ctx=29, n_embd=25 * 8, n_head=25, n_layer=2)


@pytest.mark.parametrize("mesh", ["model=2", "model=4", "model=3"])
def test_25_heads_are_split_over_devices_that_do_not_divide_them(on_mesh: Meshes, mesh: str) -> None:
    from gpt_xp.training.start import random_params

    config = HEADS_OF_1558M
    params = tree_map(lambda leaf: np.asarray(3 * leaf, np.float64), random_params(config, 3))
    tokens = np.random.RandomState(5).randint(0, config.n_vocab, size=(2, 23)).astype(np.int32)
    expected = Model(params, config, backend=gpt_xp.get_backend("numpy", dtype="float64")).logits(tokens)
    model = Model(params, config, backend=on_mesh(mesh))
    assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float32"])


def test_a_mesh_that_computes_much_for_nothing_is_noted(on_mesh: Meshes) -> None:
    with pytest.warns(GptXpWarning, match="the mesh model=4 pads 1 heads to 4"):
        on_mesh("model=4").place(small_params("one-head"), CONFIGS["one-head"])


def test_params_come_back_as_they_were(mesh_backend: Backend) -> None:
    params, config = tree_map(np.float32, small_params("prime")), CONFIGS["prime"]
    model = Model(params, config, backend=mesh_backend)
    fetched = mesh_backend.fetch(model.params, config)
    for found, expected in zip(leaves(fetched), leaves(params), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_saved_model_is_the_loaded_one(bundled: Model, shakespeare: Model, tmp_path: Path) -> None:
    bundled.save(tmp_path)
    saved = gpt_xp.load(tmp_path, backend="numpy")
    for found, expected in zip(leaves(saved.params), leaves(shakespeare.params), strict=True):
        np.testing.assert_array_equal(found, expected)


# The text.


@pytest.fixture(scope="module")
def expected(shakespeare: Model) -> dict[str, list[gpt_xp.Generation]]:
    return {
        "sampled": shakespeare.generate(PROMPTS, max_tokens=60, **SAMPLED),
        "greedy": shakespeare.generate(PROMPTS, max_tokens=60),
    }


@pytest.fixture(scope="module", params=["data=4", "data=2,model=2", "model=4", "model=3"])
def bundled(request: pytest.FixtureRequest, on_mesh: Meshes) -> Model:
    return gpt_xp.load("shakespeare", backend=on_mesh(request.param))


def texts(results: Sequence[gpt_xp.Generation]) -> list[list[int]]:
    return [each.token_ids for each in results]


def test_text_is_that_of_numpy(bundled: Model, expected: dict[str, list[gpt_xp.Generation]]) -> None:
    sampled = bundled.generate(PROMPTS, max_tokens=60, **SAMPLED)
    assert texts(sampled) == texts(expected["sampled"])
    assert texts(bundled.generate(PROMPTS, max_tokens=60)) == texts(expected["greedy"])
    for found, other in zip(sampled, expected["sampled"], strict=True):
        np.testing.assert_allclose(found.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("mesh", ["data=4", "model=4"])  # one that pads nothing, and one that pads heads
def test_params_of_a_mesh_can_be_assigned(on_mesh: Meshes, mesh: str) -> None:
    model, other = (Model(small_params(name), CONFIGS[name], backend=on_mesh(mesh)) for name in ("prime", "sharp"))
    model.params = other.params
    np.testing.assert_array_equal(model.logits([3, 5, 7]), other.logits([3, 5, 7]))
    with pytest.raises(gpt_xp.errors.ConfigError, match="wte must be"):
        Model(model.params, model.config, backend="numpy")


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_that_the_mesh_does_not_divide(
    bundled: Model, expected: dict[str, list[gpt_xp.Generation]], rows: int
) -> None:
    results = bundled.generate(PROMPTS[:rows], max_tokens=60, **SAMPLED)
    assert texts(results) == texts(expected["sampled"][:rows])
    assert results[0].stats.rows == rows
    assert results[0].stats.generated_tokens == 60 * rows


def test_stop_strings_speculation_and_repetition(bundled: Model, shakespeare: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "stop": "\n", "repetition_penalty": 1.3}
    for more in ({}, {"speculate": True}):
        found = bundled.generate(PROMPTS[:3], **options, **more)
        assert texts(found) == texts(shakespeare.generate(PROMPTS[:3], **options))


def test_the_cache_grows_and_the_ring_begins_again(on_mesh: Meshes) -> None:
    """The model has 307 tokens of context, and rows of different lengths outrun it."""
    params, config = small_params("long"), CONFIGS["long"]
    prompts = [[1] * 250, [2, 3]]
    expected = Model(params, config, backend="numpy").generate(prompts, max_tokens=300)
    found = Model(params, config, backend=on_mesh("data=2,model=2")).generate(prompts, max_tokens=300)
    assert texts(found) == texts(expected)


def test_quantized_weights_on_the_axis_data(on_mesh: Meshes) -> None:
    expected = gpt_xp.load("shakespeare", backend="jax", quantize="int8").generate(PROMPTS, max_tokens=20)
    found = gpt_xp.load("shakespeare", backend="jax", mesh="data=4", quantize="int8").generate(PROMPTS, max_tokens=20)
    assert texts(found) == texts(expected)


def test_scores_are_those_of_numpy(bundled: Model, shakespeare: Model) -> None:
    text = "KING HENRY:\nWhat say you to that, my lord? " * 50
    found, expected = bundled.score(text), shakespeare.score(text)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert [each.index for each in bundled.rank("ROMEO", [":", " is", "x"])] == [
        each.index for each in shakespeare.rank("ROMEO", [":", " is", "x"])
    ]


def test_each_worker_of_a_bulk_job_has_a_mesh_of_its_own(
    on_mesh: Meshes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm may have started several commands, each with its slice."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options: dict[str, Any] = {"model": "shakespeare", "max_tokens": 5, "temperature": 0.8, "seed": 11}
    gpt_xp.bulk(tmp_path / "prompts.txt", tmp_path / "a", backend="jax", mesh="data=2,model=2", **options)
    gpt_xp.bulk(tmp_path / "prompts.txt", tmp_path / "b", backend="numpy", **options)
    parts = [(tmp_path / name / "000" / "part-000000.jsonl").read_bytes() for name in "ab"]
    assert parts[0] == parts[1]


# What the devices exchange, and what they hold.

WIDE = GPT2Config(n_vocab=1021, n_ctx=128, n_embd=192, n_head=12, n_layer=2)
COLLECTIVE = re.compile(r"= \(?(\w+\[[\d,]*\]).*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\(")


def collectives(compiled: Any) -> collections.Counter[tuple[str, str]]:
    """Count the exchanges in a compiled program, by kind and by the shape of the result."""
    found = COLLECTIVE.findall(re.sub(r"-start\(", "(", compiled.as_text()))
    return collections.Counter((kind, shape) for shape, kind in found)


def wide_model(backend: Backend) -> Model:
    from gpt_xp.training.start import random_params

    return Model(random_params(WIDE, 1), WIDE, backend=backend)


def lowered(model: Model, function: Any, static: tuple[str, ...], *arguments: Any, **options: Any) -> Any:
    import jax

    with jax.default_matmul_precision("highest"):
        jitted = jax.jit(function, static_argnames=("config", "xp", *static))
        return jitted.lower(model.params, *arguments, config=WIDE, xp=model.backend.xp, **options).compile()


@pytest.mark.parametrize(("mesh", "rows"), [("model=4", 4), ("data=2,model=2", 2), ("model=3", 4)])
@pytest.mark.parametrize("n_tokens", [1, 64])
def test_a_layer_takes_two_sums_over_the_devices(on_mesh: Meshes, mesh: str, rows: int, n_tokens: int) -> None:
    """Also with heads, widths and a vocabulary that the mesh does not divide: 12 heads on 3, 1021 tokens on 4."""
    model = wide_model(on_mesh(mesh))
    backend = model.backend
    start = backend.asarray(np.zeros(4, np.int32))
    cache = backend.new_cache(WIDE, model.params["wpe"], 64, start)
    tokens = backend.asarray(np.zeros((4, n_tokens), np.int32))
    found = collectives(lowered(model, next_token_logits, (), tokens, cache, n_tokens))
    n_padded = math.ceil(1021 / parse_mesh(mesh).model) * parse_mesh(mesh).model
    assert found == {
        ("all-reduce", f"f32[{rows * n_tokens},192]"): 2 * WIDE.n_layer + 1,  # one is that of the embedding
        ("all-gather", f"f32[{rows},{n_padded}]"): 1,
    }


def test_sampling_adds_no_exchange(on_mesh: Meshes) -> None:
    model = wide_model(on_mesh("data=2,model=2"))
    backend = model.backend
    cache = backend.new_cache(WIDE, model.params["wpe"], 64, backend.asarray(np.zeros(4, np.int32)))
    filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": None, "repetition_penalty": None}
    noise = backend.asarray(np.zeros((16, 4, WIDE.n_vocab), np.float32))
    token = backend.asarray(np.zeros(4, np.int32))
    compiled = lowered(
        model, decode_steps, ("k", "decode_block", "top_k"), token, cache, None, noise, None,
        k=16, decode_block=backend.decode_block, **filters,
    )  # fmt: skip
    found = collections.Counter(kind for kind, _ in collectives(compiled).elements())
    assert found == {"all-reduce": 2 * WIDE.n_layer + 1, "all-gather": 1}


@pytest.mark.parametrize("mesh", ["data=4", "data=2,model=2", "model=4", "model=3"])
def test_each_device_holds_its_part_of_params_and_cache(on_mesh: Meshes, mesh: str) -> None:
    import jax

    model, shape = wide_model(on_mesh(mesh)), parse_mesh(mesh)
    first = model.backend.asarray(np.zeros(4, np.int32)).sharding.mesh.devices.flat[0]

    def held(tree: Any) -> int:
        arrays = [each for each in jax.tree.leaves(tree) if isinstance(each, jax.Array)]
        parts = [part for each in arrays for part in each.addressable_shards if part.device == first]
        return sum(part.data.nbytes for part in parts)

    assert held(model.params) == params_bytes_on_device(WIDE, shape, "float32")
    whole = {"wpe", "ln_1", "ln_2", "ln_f"}
    blocks = [block[name] for block in model.params["blocks"] for name in ("ln_1", "ln_2")]
    replicated = held([model.params[name] for name in whole & model.params.keys()] + blocks)
    total = WIDE.n_params * ITEM_SIZE["float32"]
    assert held(model.params) <= (total - replicated) / shape.model * 1.1 + replicated
    cache = model.backend.new_cache(WIDE, model.params["wpe"], 128, model.backend.asarray(np.zeros(4, np.int32)))
    rows = 4 // (shape.data or 1)
    assert held(cache.layers) == rows * cache_bytes_on_device(WIDE, shape, "float32")


def test_bytes_on_one_device_are_those_of_the_whole_model() -> None:
    config = gpt_xp.load("shakespeare", backend="numpy").config
    assert params_bytes_on_device(config, MeshShape(), "float32") == 4 * config.n_params


def test_only_the_part_of_this_device_is_read(on_mesh: Meshes) -> None:
    """Of a mapped file, other parts are then never loaded from the disk."""
    backend, config = on_mesh("model=4"), WIDE
    from gpt_xp.training.start import random_params

    class Recorded(np.ndarray):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            part = super().__getitem__(index)
            Recorded.read = max(Recorded.read, part.nbytes)
            return part

    params = random_params(config, 0)
    params["wte"] = params["wte"].view(Recorded)
    backend.place(params, config)
    assert 0 < Recorded.read <= params["wte"].nbytes / 4 + 4 * config.n_embd


# What knows of meshes.


def test_the_mathematics_knows_no_mesh() -> None:
    package = Path(gpt_xp.__file__).parent
    files = [package / name for name in ("transformer.py", "kv_cache.py", "config.py", "picogpt.py")]
    files += [file for folder in ("scoring", "generation") for file in (package / folder).glob("*.py")]
    assert len(files) > 15
    words = re.compile(r"mesh|shard|psum|all_reduce|all_gather|axis_name|process_index|process_count|jax\.distributed")
    for file in files:
        found = [line for line in file.read_text().splitlines() if words.search(line)]
        assert not found, f"{file.name}: {found}"


def test_every_weight_of_a_model_is_placed(on_mesh: Meshes) -> None:
    placed = on_mesh("model=2").place(small_params("prime"), CONFIGS["prime"])
    assert len(weights_of(placed)) == len(leaves(small_params("prime")))
