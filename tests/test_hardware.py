"""The report on a backend: settings, which models fit, and how fast memory is."""

import json
from typing import Any

import numpy as np
import pytest
from libraries import make_backend

import gpt_xp
from gpt_xp import Backend, BackendInfo, hardware
from gpt_xp.backend import DeviceInfo
from gpt_xp.hardware import (
    BackendReport,
    MeshFit,
    ModelFit,
    measure_bandwidth,
    mesh_fits,
    model_fit,
    report_on_backends,
)
from gpt_xp.hub.published import MODELS
from gpt_xp.memory import ITEM_SIZE
from gpt_xp.mesh import parse_mesh
from gpt_xp.registry import get_backend

NUMPY = BackendInfo("numpy", "2", (DeviceInfo("cpu", "2 cores", 8_000_000_000),))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that reads 10 GB a second."""
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda backend: 10e9)


def test_settings_are_short_texts(backend: Backend) -> None:
    settings = backend.settings()
    assert settings
    assert json.loads(json.dumps(settings)) == settings
    assert all(isinstance(value, str) and value and len(key) < 40 for key, value in settings.items())


def test_settings_of_numpy() -> None:
    assert get_backend("numpy", threads=7).settings()["threads"] in ("7", "1")  # 1: a BLAS without threads
    assert "blas" in make_backend("numpy").settings()


def test_settings_of_numpy_whose_blas_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    built_with = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    assert make_backend("numpy").settings() == {"blas": f"{built_with['name']} {built_with['version']}"}


def test_settings_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend("jax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    assert backend.settings()["XLA_FLAGS"] == "--xla_something=1"
    assert backend.settings()["matmul_precision"] == "highest"
    monkeypatch.delenv("XLA_FLAGS")
    assert "XLA_FLAGS" not in backend.settings()


def test_what_fits_against_numbers_worked_out_by_hand() -> None:
    # 124M has 124,439,808 params; its cache holds 2 x 12 layers x 1024 tokens x 768 numbers: 18,874,368.
    for dtype, size in (("float32", 4), ("float64", 8), ("float16", 2), ("bfloat16", 2)):
        needed = 143_314_176 * size
        config = MODELS["124M"].config
        enough = model_fit("124M", config, dtype, needed, bandwidth=124_439_808e3)
        assert enough == ModelFit("124M", dtype, needed, True, pytest.approx(1000 / size))
        assert model_fit("124M", config, dtype, needed - 1, 1.0).fits is False
        assert model_fit("124M", config, dtype, None, 1.0).fits is None
    # 1558M: 1,557,611,200 params, and 2 x 48 x 1024 x 1600 = 157,286,400 numbers of cache, in float32.
    assert model_fit("1558M", MODELS["1558M"].config, "float32", 1, 1.0).needed == 6_859_590_400


def test_what_a_device_of_a_mesh_holds_against_numbers_worked_out_by_hand() -> None:
    # 1558M has 25 heads of 64; 8 devices hold 4 heads each (7 are zeros), and 6283 of the 50257 tokens (7 are zeros).
    heads, width, tokens, n = 4 * 64, 4 * 1600 // 8, 6283, 1600
    block = 3 * heads * (n + 1) + heads * n + width * (2 * n + 1) + 2 * n + 4 * n  # biases of c_proj, two layer norms
    params = tokens * n + 1024 * n + 48 * block + 2 * n
    fits = {each.model: each for each in mesh_fits(parse_mesh("data=3,model=8"), ["float32"], 4 * params)}
    assert fits["1558M"] == MeshFit("1558M", "float32", 4 * params, 4 * 2 * 48 * 1024 * heads, False)
    assert fits["124M"].fits
    # On one device, nothing is padded.
    whole = {each.model: each for each in mesh_fits(parse_mesh("data=8"), ["bfloat16"], None)}
    assert (whole["124M"].params, whole["124M"].cache) == (2 * 124_439_808, 2 * 18_874_368)
    assert whole["124M"].fits is None


def test_a_report(quick: None) -> None:
    [found] = report_on_backends([NUMPY, BackendInfo("cupy", problem="cupy is not installed")])
    assert (found.backend, found.bandwidth, found.problem) == ("numpy", 10e9, None)
    assert found.device == NUMPY.devices[0]
    assert found.settings == get_backend("numpy").settings()
    assert [(each.model, each.dtype) for each in found.models] == [
        (name, dtype) for name in MODELS for dtype in ("float32", "float64")
    ]
    fits = {(each.model, each.dtype): each.fits for each in found.models}  # in 8 GB
    assert fits["1558M", "float32"]
    assert not fits["1558M", "float64"]
    assert found.models[0].decode_limit == pytest.approx(10e9 / (124_439_808 * 4))


def test_half_precision_where_torch_computes_in_it(quick: None) -> None:
    make_backend("torch")
    [info] = [info for info in gpt_xp.backends() if info.name == "torch"]
    [found] = report_on_backends([info])
    assert {each.dtype for each in found.models} == {"float32", "float64", "bfloat16", "float16"}


def test_a_backend_that_cannot_be_used_after_all(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: object, **options: object) -> None:
        raise gpt_xp.errors.BackendError("it cannot", "mend it")

    monkeypatch.setattr("gpt_xp_backends.numpy_backend.NumPyBackend.__init__", refuse)
    assert report_on_backends([NUMPY]) == [BackendReport("numpy", problem="it cannot: mend it")]


def test_bandwidth_is_bytes_per_second(backend: Backend) -> None:
    # A device of 128 MB, of which an eighth is used: 16 MB.
    small = backend.replace(device_memory=2**27)
    found = measure_bandwidth(small, seconds=0.02)
    assert 1e8 < found < 1e14


def test_the_matrix_grows_until_reading_it_takes_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, backend = [], make_backend("numpy").replace(device_memory=None)
    monkeypatch.setattr(hardware, "SMALLEST_MATRIX", 2**4)
    monkeypatch.setattr(hardware, "LARGEST_MATRIX", 2**7)

    def shortest(backend: Backend, function: object, seconds: float, vector: object, matrix: Any) -> float:
        sides.append(matrix.shape[0])
        assert matrix.sum() == matrix.size
        return 1e-3 if matrix.shape[0] < limit else 2e-2

    monkeypatch.setattr(hardware, "_shortest", shortest)
    limit = 64
    assert measure_bandwidth(backend) == 64 * 64 * 4 / 2e-2
    assert sides == [16, 16, 32, 32, 64, 64]
    limit = 10_000
    assert measure_bandwidth(backend) == 128 * 128 * 4 / 1e-3
    assert measure_bandwidth(backend.replace(device_memory=8 * 4 * 32**2)) == 32 * 32 * 4 / 1e-3


# The command


@pytest.fixture
def small_memory(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_xp.cli.backends.find_backends", lambda: [NUMPY, BackendInfo("cupy", problem="none here")])
    monkeypatch.setattr("gpt_xp.hardware.get_backend", lambda name, **options: get_backend(name, **options, threads=1))
    monkeypatch.setattr(
        "gpt_xp_backends.numpy_backend.NumPyBackend.settings", lambda self: {"blas": "some 1.2", "threads": "1"}
    )


def test_the_table(call, small_memory: None) -> None:
    brief, full = call("backends").out, call("backends", "--verbose").out
    assert full.startswith(brief)
    assert full[len(brief) :] == (
        "\n"
        "numpy on cpu reads 10.0 GB/s; blas some 1.2, threads 1\n"
        "  model       float32         float64\n"
        "  124M         0.6 yes    20   1.1 yes    10\n"
        "  355M         1.6 yes   7.0   3.2 yes   3.5\n"
        "  774M         3.5 yes   3.2   6.9 yes   1.6\n"
        "  1558M        6.9 yes   1.6  13.7 no    0.8\n"
        "  distilgpt2   0.4 yes    31   0.7 yes    15\n"
        "\n"
        "Under each dtype: the GB of the params and of the cache of one row at full\n"
        "context; whether they fit the device; and the most tokens per second in one row\n"
        "at that bandwidth, because each token reads all params once.\n"
    )


def test_the_json(call, small_memory: None) -> None:
    brief, full = (json.loads(call("backends", "--json", *more).out) for more in ([], ["--verbose"]))
    [found] = full.pop("diagnoses")
    assert full == brief
    assert found.keys() == {"backend", "device", "settings", "bandwidth", "models", "problem"}
    assert found["settings"] == {"blas": "some 1.2", "threads": "1"}
    assert found["device"]["memory"] == 8_000_000_000
    assert found["models"][0] == {
        "model": "124M", "dtype": "float32", "needed": 573_256_704, "fits": True,
        "decode_limit": pytest.approx(20.09, abs=0.01),
    }  # fmt: skip
    assert len(found["models"]) == 2 * len(MODELS)


def test_lines_are_no_longer_than_a_terminal(call, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the longest numbers: a GPU of 4.8 TB/s in four dtypes."""
    device = DeviceInfo("cuda:0", "NVIDIA H200", 150_000_000_000)
    models = tuple(
        model_fit(name, model.config, dtype, device.memory, 4.8e12)
        for name, model in MODELS.items()
        for dtype in ITEM_SIZE
    )
    settings = {"XLA_FLAGS": "--xla_gpu_something=true --xla_gpu_something_else=false", "platform": "cuda 13"}
    found = [BackendReport("jax", device, settings, 4.8e12, models), BackendReport("cupy", problem="word " * 40)]
    monkeypatch.setattr("gpt_xp.cli.backends.find_backends", lambda: [NUMPY])
    monkeypatch.setattr("gpt_xp.cli.backends.report_on_backends", lambda infos: found)
    lines = call("backends", "--verbose").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("29300" in line for line in lines)  # distilgpt2 has 81,912,576 params
