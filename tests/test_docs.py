"""README and the pages of docs/: their examples run, and the code that they show is the code that is here.

| a block | is |
|---|---|
| ```python | run; one with `import gpt_xp` begins a program, and those after it continue that program |
| ```python behind <!-- FILE --> or <!-- FILE: FUNCTION --> | that file or function, and not run |
| ```sh | run, each line as a command |
| ```bash | shown; its gpt-xp commands are parsed |
| ```output | all that the block before it prints |

`PYTHONPATH=tests/support python tests/test_docs.py` updates the pages.
"""

import ast
import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from commands import PATIENCE, Result
from folders import ROOT
from libraries import skipping_what_is_missing
from small_trainings import story

from gpt_xp.cli.train import TrainingBar

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- ([\w./]+)(?:: (\w+))? -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ITS_OWN_PROCESS = re.compile(r"^os\.environ\[|^jax\.config\.update", re.MULTILINE)  # settings that last

Call = Callable[..., Result]


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    shows: tuple[str, str | None] | None  # a file, and a function in it
    output: str | None  # of the block behind it

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    for match, after in zip(found, [*found, None][1:], strict=True):
        file, function, language, code = match.groups()
        line = text.count("\n", 0, match.start(4)) + 1
        output = after[4] if after and after[3] == "output" else None
        yield Block(page, line, language, code, (file, function) if file else None, output)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def programs() -> Iterator[list[Block]]:
    """The blocks of Python that are run, those of one program together."""
    program: list[Block] = []
    for block in BLOCKS:
        if block.language == "python" and block.shows is None:
            if program and ("import gpt_xp\n" in block.code or block.page != program[0].page):
                yield program
                program = []
            program.append(block)
    yield program


def of(language: str, *names: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and (not names or block.page.name in names)]


def commands(block: Block) -> list[str]:
    """The lines that run gpt-xp."""
    return [line for line in block.code.splitlines() if re.search(r"(^|\| |^\.venv/bin/)gpt-xp ", line)]


def run_python(program: list[Block]) -> Iterator[str]:
    """Run the blocks one after another; yield what each prints."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in program:
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")  # errors have the page's lines
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        yield printed.getvalue()


def shown(file: str, function: str | None) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    if function is None:
        return text
    node = next(each for each in ast.parse(text).body if isinstance(each, ast.FunctionDef) and each.name == function)
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_variables: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("program", [*programs()], ids=lambda program: str(program[0]))
def test_python(program: list[Block]) -> None:
    code = "\n".join(block.code for block in program)
    if "jax" in code:
        pytest.importorskip("jax", reason="jax is not installed")
    if ITS_OWN_PROCESS.search(code):
        assert all(block.output is None for block in program)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return
    for block, printed in zip(program, run_python(program), strict=True):
        assert block.output in (None, printed), block


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands(block: Block, call: Call) -> None:
    printed = ""
    for line in commands(block):
        if "jax" in line:
            pytest.importorskip("jax", reason="jax is not installed")
        before, pipe, command = line.rpartition(" | ")
        stdin = subprocess.run(before, shell=True, stdout=subprocess.PIPE, check=True).stdout if pipe else b""
        result = call(*shlex.split(command, comments=True)[1:], stdin=stdin)
        assert result.code == 0, result.err
        assert result.out
        printed += result.out
    assert block.output in (None, printed)


def test_the_same_text_with_numpy_and_jax(call: Call) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    first, second, *_ = commands(of("sh", "command-line.md")[0])
    assert "--backend jax" in second
    texts = [call(*shlex.split(line, comments=True)[1:]).out for line in (first, second)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40


@pytest.mark.parametrize("block", [block for block in of("bash") if commands(block)], ids=str)
def test_commands_that_are_not_run_have_right_options(
    block: Block, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shakespeare.txt", "letters.txt", "book.txt", "prompts.txt", "text.txt"):
        (tmp_path / name).write_text("To be, or not to be")
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    for line in commands(block):
        words = shlex.shlex(line, posix=True, punctuation_chars="<>|")
        words.whitespace_split = True
        arguments = [*iter(words.get_token, None)]
        end = next((place for place, word in enumerate(arguments) if word in "<>|"), None)
        result = call(*arguments[1:end])
        assert result.code == 0, result.err


def test_the_commands_of_training(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it stands there, on small data: what is not said is set by variables, and 124M is a directory here."""
    with skipping_what_is_missing("optax"):
        import optax  # noqa: F401
    training, using = ([shlex.split(line)[1:] for line in commands(block)] for block in of("bash", "training.md")[:2])
    assert [command[0] for command in training] == ["train"] * 3
    (tmp_path / "shakespeare.txt").write_bytes(story(3000).encode())
    (tmp_path / "letters.txt").write_bytes(story(3000, seed=1).encode())
    short = {f"GPT_XP_{name}": "1" for name in ("WARMUP", "EVAL_EVERY")}
    short |= {"GPT_XP_STEPS": "3", "GPT_XP_TRAIN_BATCH_SIZE": "5"}
    shape = {"N_LAYER": 1, "N_HEAD": 3, "N_EMBD": 39, "N_CTX": 37, "VOCAB_SIZE": 277}

    def run(arguments: list[str], code: int = 0, **variables: str) -> str:
        result = call(*arguments, **variables)
        assert result.code == code, result.err
        return result.out

    done = run(training[0], **short, **{f"GPT_XP_{name}": str(value) for name, value in shape.items()})
    assert "my-model has the model of step 3 of 3" in done
    assert run(using[0])
    assert "perplexity per token" in run(using[1])
    (tmp_path / "my-model").rename(tmp_path / "124M")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingBar, "stepped", lambda self, step, loss, tokens: signal.raise_signal(signal.SIGINT))
        run(training[1], code=130, **short)
    assert "my-letters has the model of step" in run(training[2])
    assert len((tmp_path / "my-letters" / "train.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.shows], ids=str)
def test_the_code_that_is_shown_is_the_code_that_is_here(block: Block) -> None:
    assert block.code == shown(*block.shows), "run: PYTHONPATH=tests/support python tests/test_docs.py"


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_the_entry_point_that_is_shown_is_in_pyproject(block: Block) -> None:
    header, line = block.code.splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert line in project.partition(header)[2].partition("\n[")[0]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_text_imports_is_there(page: Path) -> None:
    for line in re.findall(r"`((?:from|import) gpt_xp[^`]*)`", page.read_text(encoding="utf-8")):
        exec(line, {})


def test_readme_is_one_page_and_leads_to_all_others() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def test_the_two_commands_come_first() -> None:
    first, second = of("sh", "README.md")[:2]
    assert next(block for block in BLOCKS if block.page.name == "README.md") == first
    assert first.code.splitlines()[0] == "python3 -m venv .venv"
    assert 'gpt-xp -m shakespeare --temperature 0.8 --seed 11 "ROMEO:"' in first.code
    assert second.code.splitlines()[-1].endswith("-m pytest -n auto")


def update() -> None:
    """Put into the pages what the code is, and what the examples print."""
    printed = {}
    for program in programs():
        if any(block.output is not None for block in program):
            printed |= {(b.page, b.line): out for b, out in zip(program, run_python(program), strict=True)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        before: Block | None = None
        parts, end = [], 0
        for match, block in zip(BLOCK.finditer(text), blocks_of(page), strict=True):
            new = block.code
            if block.shows:
                new = shown(*block.shows)
            elif block.language == "output" and before is not None:
                new = printed.get((before.page, before.line), new)
            parts += [text[end : match.start(4)], new]
            end, before = match.end(4), block
        page.write_text("".join([*parts, text[end:]]), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        update()
