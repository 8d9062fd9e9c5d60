"""The fixtures of all tests. `backend` runs a test on every array library that is installed."""

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

# Compiled programs are kept between runs of the suite, outside the user's cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # as `Backend.keep_compiled` does

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "numba"))

# Otherwise JAX, in each of pytest's processes, would reserve three quarters of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The tests of CuPy's kernels use NumPy arrays, whose address is another attribute than CuPy's.
_on_the_device = cupy_kernels.address
cupy_kernels.address = lambda x: x.ctypes.data if isinstance(x, np.ndarray) else _on_the_device(x)

# The time of an example depends more on the machine than on gpt-xp, so there is no deadline.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell that starts the suite in the background makes it ignore Ctrl-C, and with it every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device of JAX. In the GPU tests, a library that finds no GPU must fail, not be skipped."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # By default, JAX would use a GPU if there is one.
    elif "GPT_XP_TEST_REQUIRE" not in os.environ:
        libraries = (name.partition(":")[0] for name in ON_A_GPU)
        REQUIRED.extend(name for name in libraries if importlib.util.find_spec(name))
    if "mesh" in config.option.markexpr.replace("not mesh", ""):
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")


@pytest.fixture(scope="session", autouse=True)
def no_models_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the user's models from the tests, and the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GPT_XP_HOME", "HF_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "GPT_XP_MODEL"):
            patch.delenv(name, raising=False)
        patch.setattr("gpt_xp.hub.published.HUB", "http://127.0.0.1:9/the-hub")  # No server listens on this port.
        patch.setattr("gpt_xp.hub.published.BUCKET", "http://127.0.0.1:9/the-bucket")
        yield


@pytest.fixture(scope="session", autouse=True)
def steps_wait_for_their_kernels() -> Iterator[None]:
    """Let `native` wait while kernels are compiled. Otherwise the first tests would look at NumPy's numbers."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("llvmlite"):
            patch.setattr("gpt_xp_backends.native_backend.step.PATIENCE", 600)
        yield


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return each backend in turn, in float32."""
    return make_backend(request.param)


@pytest.fixture(scope="session")
def shakespeare() -> Model:
    """Return the bundled model on NumPy."""
    import gpt_xp

    return gpt_xp.load("shakespeare", backend="numpy")


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the user's variables, except the folder of the models."""
    for name in [name for name in os.environ if name.startswith("GPT_XP_") and name != "GPT_XP_HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # It would hide data that a failed write leaves in a buffer.


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function that runs the command in this process. With `stdin` None, stdin is closed."""

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
    """Return a fake TensorFlow that reads `tensorflow.found` in every checkpoint; `tensorflow.opened` lists them."""
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
    """Return an empty folder for gpt-xp, and set an empty cache of the Hub."""
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "home"


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Return a running Hub server with a small model in place of 124M."""
    small_published.install(monkeypatch, "124M")
    monkeypatch.setattr("gpt_xp.hub.download.FIRST_WAIT", 0.001)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        small_published.on_hub(server, MODELS["124M"])
        yield server
