"""The examples of README, and those in docs, run as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import KILLED, PATIENCE, posix, process
from libraries import skipping_what_is_missing
from small_trainings import story

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


EXAMPLES = [
    pytest.param(code, id=f"{name}: {code.strip().splitlines()[-1][:40]}")
    for name, text in {"README.md": README, **PAGES}.items()
    for code in blocks("python", text)
]


def test_there_are_pages() -> None:
    assert "jax.md" in PAGES
    assert len(EXAMPLES) > 8


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example(code: str, tmp_path: Path) -> None:
    if "jax" in code:
        pytest.importorskip("jax", reason="jax is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL,
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
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_same_text_with_numpy_and_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    lines = [line for block in blocks("sh")[2:] for line in block.splitlines() if "--seed 11" in line]
    assert "--backend jax" in lines[1]
    texts = []
    for line in lines[:2]:
        arguments = [sys.executable, "-m", "gpt_xp", *line.partition("#")[0].split()[1:-1], "ROMEO:"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=True, cwd=tmp_path)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40


def test_the_two_commands_come_first() -> None:
    first, second = blocks("sh")[:2]
    assert first.splitlines()[0] == "python3 -m venv .venv"
    assert 'gpt-xp -m shakespeare --temperature 0.8 --seed 11 "ROMEO:"' in first
    assert second.splitlines()[-1].endswith("-m pytest -n auto")


@posix
def test_the_commands_of_training(tmp_path: Path) -> None:
    """Each as it stands there, on small data: what is not said is set by variables, and 124M is a directory here."""
    section = re.search(r"^## Training\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert section is not None
    with skipping_what_is_missing("optax"):
        import optax  # noqa: F401
    training, using = (
        [shlex.split(line)[1:] for line in block.splitlines()]
        for block in re.findall(r"^```bash\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    )
    assert [command[0] for command in training] == ["train"] * 3
    (tmp_path / "shakespeare.txt").write_bytes(story(3000).encode())
    (tmp_path / "letters.txt").write_bytes(story(3000, seed=1).encode())
    shape = {"N_LAYER": 1, "N_HEAD": 3, "N_EMBD": 39, "N_CTX": 37, "VOCAB_SIZE": 277}
    short = {"STEPS": 3, "WARMUP": 1, "EVAL_EVERY": 1, "BATCH_SIZE": 5}

    def run(arguments: list[str], variables: dict[str, int], code: int = 0, **settings: Any) -> str:
        environment = os.environ | {f"GPT_XP_{name}": str(value) for name, value in variables.items()}
        done = process(*arguments, cwd=tmp_path, env=environment, **settings)
        assert done.code == code, done.err
        return done.out

    assert "my-model has the model of step 3 of 3" in run(training[0], shape | short)
    assert run(using[0], {})
    assert "perplexity per token" in run(using[1], {})
    (tmp_path / "my-model").rename(tmp_path / "124M")
    run(["step:2:1", *training[1]], short, code=-9, command=[sys.executable, "-c", KILLED])
    assert "my-letters has the model of step" in run(training[2], {})
    assert len((tmp_path / "my-letters" / "train.jsonl").read_text().splitlines()) == 4
