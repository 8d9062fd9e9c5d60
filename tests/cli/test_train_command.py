"""`gpt-xp train`: what it writes and shows, that no signal and no full disk loses anything, and what it refuses."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import KILLED, PATIENCE, Result, Terminal, posix, process, start
from libraries import skipping_what_is_missing
from small_trainings import EVERYTHING, bits, log, story

import gpt_xp
from gpt_xp.cli.train import TrainingBar
from gpt_xp.hub.find import find_model
from gpt_xp.installation import install_command
from gpt_xp.training.program import jax_backend
from gpt_xp.training.settings import TrainingSettings

# The programs of test_training, which need not be compiled again.
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in EVERYTHING.items()]
Call = Callable[..., Result]

pytestmark = [
    pytest.mark.usefixtures("no_variables"),
    pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*"),
]


@pytest.fixture(autouse=True, scope="module")
def _needs_jax_and_optax() -> None:
    with skipping_what_is_missing("jax"):
        jax_backend(TrainingSettings(data=("x",)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(story(3000).encode())
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The directory of a run that nothing disturbed, and what its process has written."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, process("train", "--data", text, "--out", str(out), *OPTIONS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "a new" / "out"


def begin(text: str, out: Path) -> tuple[str, ...]:
    return ("train", "--data", text, "--out", str(out), *OPTIONS)


def go_on(out: Path) -> tuple[str, ...]:
    return ("train", "--out", str(out), "--resume")


# --- what it writes and shows ---------------------------------------------------------------------------------------


def test_a_run_tells_each_evaluation_and_keeps_the_best(undisturbed: tuple[Path, Result], call: Call) -> None:
    out, (code, shown, told) = undisturbed
    assert code == 0, told
    lines = [
        line for line in told.splitlines() if line.startswith("gpt-xp: ")
    ]  # some versions of JAX say something too
    losses = [each["val_loss"] for each in log(out)]
    assert lines[0].startswith("gpt-xp: 0.03M parameters, 8,151 tokens to train on")
    assert [line.split(":")[1].strip() for line in lines[1:]] == ["step 0", "step 3", "step 6", "step 7"]
    for line, loss in zip(lines[1:], losses, strict=True):
        assert f"validation {loss:.4f} nats a token (" in line
        assert (" tok/s" in line) == (" training " in line) == ("step 0" not in line)
        assert line.endswith("the best so far") == (loss == min(losses[: losses.index(loss) + 1]))
    best = losses.index(min(losses))
    assert shown.startswith(f"{out} has the model of step {log(out)[best]['step']} of 7: validation {min(losses):.4f}")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "merges.txt", "model.safetensors", "train.jsonl", "training", "vocab.json",
    ]  # fmt: skip
    assert call("-m", str(out), "-n", "5", "the king").code == 0


def test_everything_that_can_be_asked_for(text: str, out: Path, tmp_path: Path, call: Call, caplog: Any) -> None:
    import jax

    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[dev]'")
    more = tmp_path / "more.txt"
    more.write_bytes(story(500, seed=1).encode())
    plot = tmp_path / "losses.png"
    options = ["--json", "--plot", str(plot), "--sample", "the king", "--save-dtype", "float16"]
    with jax.log_compiles():
        code, shown, told = call("train", "--data", text, str(more), "--out", str(out), *OPTIONS, *options)
    assert code == 0, told
    found = json.loads(shown)
    assert found.pop("best") in [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert found == {"schema": 2, "directory": str(out), "steps": 7, "stopped_early": False}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(told.split("the king")) > 4  # a sample at each evaluation
    assert all(each["sample"].startswith("the king") for each in log(out))
    counts = json.loads((out / "training" / "corpus.json").read_text())
    assert counts["train_characters"] + counts["val_characters"] == len(story(3000) + story(500, seed=1))
    assert gpt_xp.load(out).params["wte"].dtype == "float32"
    assert len(bits(out)) < 100_000
    compiled = [record.getMessage().split()[1] for record in caplog.records if "Compiling" in record.getMessage()]
    assert sum("_train_step" in name for name in compiled) == 1
    assert sum("_loss" in name for name in compiled) == 2  # the last batch is smaller


def test_help_lists_the_options_and_loads_no_jax() -> None:
    code = """
import sys
from gpt_xp.cli import run
sys.argv = ["gpt-xp", "train", "--help"]
assert run() == 0
assert not {"jax", "optax", "matplotlib", "torch"} & sys.modules.keys()
"""
    done = process(command=[sys.executable, "-c", code])
    assert done.code == 0, done.err
    expected = {*TrainingSettings.__dataclass_fields__, "from", "out", "resume", "json"} - {"start"}
    assert [name for name in sorted(expected) if f"--{name.replace('_', '-')} " not in done.out] == []


@pytest.mark.parametrize("option", [(), ("--special-tokens",)])
def test_special_tokens_in_the_text(option: tuple[str, ...], text: str, out: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "separated.txt").write_text(Path(text).read_text(encoding="utf-8") + "<|endoftext|> " * 9)
    done = call(*begin(str(tmp_path / "separated.txt"), out), *option)
    assert done.code == 0
    told = "<|endoftext|> in the text is read as plain text; --special-tokens reads it as one token\n" in done.err
    assert told == (not option)
    assert call("train", "--out", str(out), "--resume").code == 0  # it is a setting of the run


def test_a_run_that_ends_early_says_so(text: str, out: Path, call: Call, monkeypatch: Any) -> None:
    losses = iter([5.0, 4.0, 4.5])
    monkeypatch.setattr("gpt_xp.training.loop.TrainingRun._val_loss", lambda run: next(losses))
    done = call(*begin(text, out), "--patience", "1")
    assert f"{out} has the model of step 3 of 6 (ended early: 1 evaluation without a better one): " in done.out


# --- nothing lost ---------------------------------------------------------------------------------------------------

# One after the other, in one directory: each goes on where the one before was killed. A file is opened or renamed after
# the moment in its name.
KILLS = {
    "while it is tokenized": "open:val.bin.:1",
    "before the first state is saved": "os.rename:train.jsonl:1",
    "between two evaluations": "step:5:1",
    "when a better checkpoint is written but not in place": "os.rename:model.safetensors:1",
    "when the state is written but not in place": "os.rename:state.safetensors:1",
}


@posix
def test_a_killed_run_goes_on_to_the_same_bits(
    undisturbed: tuple[Path, Result], text: str, out: Path, call: Call
) -> None:
    assert log(undisturbed[0])[2]["is_best"]  # of step 6, which is where checkpoints are cut off
    arguments = begin(text, out)
    for why, moment in KILLS.items():
        killed = process(moment, *arguments, command=[sys.executable, "-c", KILLED])
        assert killed.code == -signal.SIGKILL, (why, killed.err)
        if (out / "config.json").exists():
            gpt_xp.load(out)
        arguments = go_on(out)
    done = call(*arguments)
    assert done.code == 0, done.err
    assert "going on after step 3" in done.err
    assert bits(out) == bits(undisturbed[0])
    assert log(out) == log(undisturbed[0])
    assert not [path for path in out.rglob("*") if path.name.endswith(".part") or path.name.startswith(".saving-")]


SLOW = """
import sys, time
from gpt_xp.cli import main
from gpt_xp.cli.train import TrainingBar
from gpt_xp.hub.find import find_model

show, waits = TrainingBar.stepped, eval(sys.argv.pop(1))

def stepped(self, step, loss, tokens):
    show(self, step, loss, tokens)
    if step in waits:
        print(f"after step {step}", file=sys.stderr, flush=True)
        time.sleep(waits[step])

TrainingBar.stepped = stepped
main()
"""


@posix
def test_a_terminal_has_a_bar_and_ctrl_c_saves(
    undisturbed: tuple[Path, Result], text: str, out: Path, call: Call
) -> None:
    terminal = Terminal("{2: 0.2, 4: 0.2, 5: 0.2}", *begin(text, out), command=[sys.executable, "-c", SLOW])
    terminal.read(until="after step 5")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen
    assert re.search(r"\d/7 \[00:\d\d<00:\d\d, .*loss \d\.\d{4}, [\d,]+ tok/s\]", terminal.seen)
    assert "gpt-xp: step 3: training 5." in terminal.seen
    assert f"gpt-xp: stopped; go on with: gpt-xp train --out '{out}' --resume" in terminal.seen
    done = call(*go_on(out))
    assert done.code == 0
    assert "going on after step 5" in done.err
    assert bits(out) == bits(undisturbed[0])
    assert log(out) == log(undisturbed[0])


@posix
def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_state(
    undisturbed: tuple[Path, Result], text: str, out: Path, call: Call
) -> None:
    running = start("{5: 600}", *begin(text, out), command=[sys.executable, "-c", SLOW])
    while b"after step 5" not in running.stderr.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    while b"gpt-xp: saving after this step; Ctrl-C again ends at once\n" not in running.stderr.readline():
        assert running.poll() is None  # it waits for the end of the step
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert err == b"\n"
    done = call(*go_on(out))
    assert "going on after step 3" in done.err
    assert bits(out) == bits(undisturbed[0])


@pytest.mark.parametrize(("moment", "goes_on"), [("check_start", False), ("corpus.tokenize", True)])
def test_ctrl_c_before_the_first_step(
    moment: str, goes_on: bool, text: str, out: Path, call: Call, monkeypatch: Any
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gpt_xp.training.loop.{moment}", interrupted)
    done = call(*begin(text, out))
    assert done.code == 130
    assert ("go on with" in done.err) == goes_on


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    import resource

    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@posix
@pytest.mark.parametrize(("room", "what"), [(50_000, "cannot save to"), (200_000, "cannot write")])
def test_a_full_disk_keeps_what_was_there(
    room: int, what: str, undisturbed: tuple[Path, Result], text: str, out: Path, call: Call, monkeypatch: Any
) -> None:
    """The room is too little for the second checkpoint; or only for the state, which is four times as large."""
    with monkeypatch.context() as patch, files_of_at_most(10_000_000):

        def full(bar: TrainingBar, step: int, loss: float, tokens: int) -> None:
            if step == 4:
                import resource

                before["checkpoint"], before["log"] = bits(out), log(out)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        before: dict[str, Any] = {}
        patch.setattr(TrainingBar, "stepped", full)
        failed = call(*begin(text, out))
    assert failed.code == 1
    error = failed.err.splitlines()[-1]
    assert error.startswith(f"gpt-xp: error: {what} {out}")
    assert "File too large" in error
    assert [line for line in failed.err.splitlines() if "error" in line] == [error]
    if what == "cannot save to":
        assert (bits(out), log(out)) == (before["checkpoint"], before["log"])
    assert not list(out.rglob("*.part"))
    assert call(*go_on(out)).code == 0
    assert bits(out) == bits(undisturbed[0])
    assert log(out) == log(undisturbed[0])


# --- what it refuses ------------------------------------------------------------------------------------------------

MISTAKES = [
    (["--out", "NEW"], 1, "there is nothing to train on: name the files of text (--data)"),
    (["--data", "TEXT"], 2, "Missing option '--out'"),
    (["--data", "missing.txt", "--out", "NEW"], 2, "'missing.txt' does not exist"),
    (["--data", ".", "--out", "NEW"], 2, "'.' is a directory"),
    (["--data", "-", "--out", "NEW"], 2, "'-' does not exist"),
    (["--data", "PIPE", "--out", "NEW"], 1, "is a pipe, and the text is read more than once"),
    (["--data", "TEXT", "EMPTY", "--out", "NEW"], 1, "is empty: expected text"),
    (["--data", "TEXT", "LATIN1", "--out", "NEW"], 1, "is not UTF-8 text: invalid continuation byte at byte 0"),
    (["--data", "TEXT", "--out", "TEXT"], 2, "is a file"),
    (["--data", "TEXT", "--out", "NEW", "--from", "shakespear"], 1, "there is no directory 'shakespear'"),
    (["--data", "TEXT", "--out", "NEW", "--tokenizer", "EMPTY"], 1, "is not a directory"),
    (["--data", "TEXT", "--out", "NEW", "--from", "MIXED"], 1, "and the table of this model ends at"),
    (["--data", "TEXT", "--out", "NEW", "--freeze", "1"], 1, "name the model to start from (--from)"),
    (["--data", "TEXT", "--out", "NEW", "--seed", str(2**63)], 1, "error: --seed must be below 2**63"),
    (["--data", "TEXT", "--out", "NEW", "--steps", "1e3"], 2, "'1e3' is not a valid integer"),
    (["--data", "TEXT", "--out", "NEW", "--average", "1"], 2, "1.0 is not in the range 0<=x<1"),
    (["--data", "TEXT", "--out", "NEW", "--plot", "losses.txt"], 1, "its name must end in .png, .svg, .pdf"),
    (["--data", "TEXT", "--out", "NEW", "--dtype", "bfloat16", "--device", "cpu"], 1, "does not compute in bfloat16"),
    (["--data", "TEXT", "--out", "DONE"], 1, "holds a run already: go on with it (--resume)"),
    (["--data", "TEXT", "--out", "MODEL"], 1, "holds a model that was not trained there"),
    (["--data", "TEXT", "--out", "MODEL", "--from", "MODEL"], 1, "holds a model that was not trained there"),
    (["--out", "NEW", "--resume"], 1, "holds no run to go on with"),
    (
        ["--out", "DONE", "--resume", "--steps", "8"],
        1,
        "this run was begun with --steps 7, not 8: leave it",
    ),
    (["--out", "DONE", "--resume", "--data", "EMPTY"], 1, "this run was begun with --data ("),
    (["--out", "TORN", "--resume"], 1, "state.safetensors"),
]


@pytest.fixture(scope="module")
def places(undisturbed: tuple[Path, Result], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").touch()
    (folder / "latin1").write_bytes("Ô Romeo".encode("latin-1") * 100)
    model = shutil.copytree(undisturbed[0], folder / "model", ignore=shutil.ignore_patterns("training"))
    mixed = shutil.copytree(model, folder / "mixed")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(find_model("shakespeare") / name, mixed / name)
    torn = shutil.copytree(undisturbed[0], folder / "torn")
    os.truncate(torn / "training" / "state.safetensors", 1000)
    pipe = folder / "pipe"
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
    found = {"EMPTY": folder / "empty", "LATIN1": folder / "latin1", "MODEL": model, "TORN": torn, "PIPE": pipe}
    found["MIXED"] = mixed
    return {"TEXT": text, "DONE": str(undisturbed[0])} | {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(("args", "code", "message"), MISTAKES)
def test_mistakes_are_one_clear_line(
    args: list[str], code: int, message: str, places: dict[str, str], out: Path, call: Call
) -> None:
    if "PIPE" in args and not Path(places["PIPE"]).exists():
        pytest.skip("there are no named pipes here")
    before = bits(Path(places["DONE"]))
    files = sorted(Path(places["MODEL"]).rglob("*"))
    result = call("train", *({**places, "NEW": str(out)}.get(arg, arg) for arg in args))
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == (1 if code == 1 else 4)
    assert not (out / "model.safetensors").exists()
    assert not out.parent.exists(), "it fails at once, and leaves nothing"
    assert bits(Path(places["DONE"])) == before
    assert sorted(Path(places["MODEL"]).rglob("*")) == files


@pytest.mark.parametrize("library", ["jax", "optax"])
def test_a_missing_library_is_told_with_its_command(
    library: str, text: str, out: Path, call: Call, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    result = call(*begin(text, out))
    assert result.code == 1
    assert result.err == f"gpt-xp: error: {library} is not installed: {install_command('train')}\n"


def test_threads_are_set_before_jax_starts(text: str, out: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = process(*begin(text, out), "--threads", "1", "--vocab-size", "100", env=environment)
    assert "--vocab-size is 100" in done.err  # the next mistake
