"""README's examples run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_example(code: str, tmp_path: Path) -> None:
    if "jax" in code:
        pytest.importorskip("jax", reason="jax is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# The first two blocks install gpt-xp; CI runs those in a fresh copy of the checkout.
@pytest.mark.parametrize("line", [line for block in blocks("sh")[2:] for line in block.splitlines()])
def test_shell_example(line: str, tmp_path: Path) -> None:
    if "jax" in line:
        pytest.importorskip("jax", reason="jax is not installed")
    bash = shutil.which("bash") or pytest.skip("the examples are written for bash")
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", line],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_same_text_with_numpy_and_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    lines = [line for block in blocks("sh")[2:] for line in block.splitlines() if "--seed 1" in line]
    assert "--backend jax" in lines[1]
    texts = []
    for line in lines[:2]:
        arguments = [sys.executable, "-m", "gpt_xp", *line.partition("#")[0].split()[1:-1], "ROMEO:"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40


def test_the_two_commands_come_first() -> None:
    first, second = blocks("sh")[:2]
    assert first.splitlines()[0] == "python3 -m venv .venv"
    assert 'gpt-xp -m shakespeare --temperature 0.8 --seed 1 "ROMEO:"' in first
    assert second.splitlines()[-1].endswith("-m pytest -n auto")
