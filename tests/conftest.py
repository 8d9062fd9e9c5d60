"""The fixtures: `backend` runs a test on every array library that is installed."""

import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_published
from commands import Result
from gpt_xp_backends.cupy_backend import kernels as cupy_kernels
from hypothesis import HealthCheck, settings
from libraries import BACKENDS, ON_A_GPU, REQUIRED, make_backend
from openai_files import FakeReader, make_tensors, variables
from servers import HubServer

from gpt_xp import Backend, Model
from gpt_xp.checkpoint import openai as openai_checkpoint
from gpt_xp.cli import run
from gpt_xp.hub.published import MODELS

# Compiled programs are kept between runs of the suite, and out of the user's own cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # as `Backend.keep_compiled` does

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "numba"))

# JAX takes three quarters of a GPU when it starts, and each of pytest's processes would.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# In the tests of CuPy's kernels NumPy's arrays stand in for CuPy's, and have their address in another place.
_on_the_device = cupy_kernels.address
cupy_kernels.address = lambda x: x.ctypes.data if isinstance(x, np.ndarray) else _on_the_device(x)

# How long an example takes says more of the machine than of gpt-xp.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell that starts the suite in the background has it ignore Ctrl-C, and every process that a test starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Decide what JAX computes on, and what may be skipped: a library that finds no GPU must fail in the GPU tests."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there is a GPU, JAX would compute on it by default
    elif "GPT_XP_TEST_REQUIRE" not in os.environ:
        libraries = (name.partition(":")[0] for name in ON_A_GPU)
        REQUIRED.extend(name for name in libraries if importlib.util.find_spec(name))


@pytest.fixture(scope="session", autouse=True)
def no_models_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test find, or fetch, what is on this machine or on the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GPT_XP_HOME", "HF_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "GPT_XP_MODEL"):
            patch.delenv(name, raising=False)
        patch.setattr("gpt_xp.hub.published.HUB", "http://127.0.0.1:9/the-hub")  # a port where nobody listens
        patch.setattr("gpt_xp.hub.published.BUCKET", "http://127.0.0.1:9/the-bucket")
        yield


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend, in float32."""
    return make_backend(request.param)


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """The bundled model on NumPy."""
    import gpt_xp

    return gpt_xp.load("shakespeare", backend="numpy")


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the user's settings, but for where the models are."""
    for name in [name for name in os.environ if name.startswith("GPT_XP_") and name != "GPT_XP_HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide what a failed write leaves in a buffer


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process; stdin is closed where it is None."""

    def call(*args: str, stdin: bytes | None = b"", **variables: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gpt-xp", *args])
            patch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in variables.items():
                patch.setenv(name, value)
            code = run()
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def tensorflow(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A TensorFlow that finds `tensorflow.found` in every checkpoint; `tensorflow.opened` says which it has read."""
    fake = SimpleNamespace(found=variables(make_tensors()), opened=[])

    def open_reader(prefix: str) -> FakeReader:
        fake.opened.append(prefix)
        return FakeReader(fake.found)

    monkeypatch.setattr(openai_checkpoint, "_open_reader", open_reader)
    monkeypatch.setattr(openai_checkpoint, "has_tensorflow", lambda: True)
    monkeypatch.setattr("gpt_xp.hub.find.has_tensorflow", lambda: True)
    return fake


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and an empty one of the Hub's."""
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "home"


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that has a small 124M."""
    small_published.install(monkeypatch, "124M")
    monkeypatch.setattr("gpt_xp.hub.download.FIRST_WAIT", 0.001)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        small_published.on_hub(server, MODELS["124M"])
        yield server
