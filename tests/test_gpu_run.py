"""Check the settings with which the suite runs on a machine with a GPU, as far as this can be done without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in another process, which sees no GPU."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GPT_XP_TEST_REQUIRE", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    environment = kept | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"} | variables
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)


def test_a_gpu_is_shared_by_the_processes_of_the_suite() -> None:
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_a_library_without_a_gpu_fails_the_gpu_tests() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    test = f"{TESTS / 'generation' / 'test_generation.py'}::test_running_out_of_memory_on_a_gpu"
    done = pytest_run("-m", "gpu", f"{test}[jax:gpu]")
    assert done.returncode == 1, done.stdout
    assert "jax is required here: jax has no device 'gpu' here" in done.stdout
    # Who has a GPU and wants no JAX there says so.
    done = pytest_run("-m", "gpu", f"{test}[jax:gpu]", GPT_XP_TEST_REQUIRE="numpy")
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def test_all_other_tests_run_jax_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    here = tmp_path / "test_platforms.py"
    here.write_text("import os\ndef test_platform():\n    assert os.environ['JAX_PLATFORMS'] == 'cpu'\n")
    done = pytest_run("-p", "conftest", str(here), PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS / "support")]))
    assert done.returncode == 0, done.stdout
