"""`gpt_xp.train`: what it keeps, that nothing is lost, and what it refuses."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import skipping_what_is_missing
from small_models import leaves
from small_trainings import EVERYTHING, SHAPE, SMALL, bits, log, story

import gpt_xp
from gpt_xp import Evaluation, GptXpError, Training
from gpt_xp.checkpoint import checkpoint
from gpt_xp.errors import BackendError, CheckpointError, NumericalError, SettingError, TextError
from gpt_xp.training import corpus
from gpt_xp.training.log import Watcher
from gpt_xp.training.program import Program, jax_backend
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.training.start import random_params
from gpt_xp.training.state import load_state

pytestmark = pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")


@pytest.fixture(autouse=True, scope="module")
def _needs_jax_and_optax() -> None:
    with skipping_what_is_missing("jax"):
        jax_backend(TrainingSettings(data=("x",)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(story(3000).encode())
    return path


class Stops(Watcher):
    """A process that is killed at a given moment, as far as one process can play it."""

    class Now(BaseException):
        pass

    def __init__(self, when: Callable[[Any], bool]) -> None:
        self.when = when

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        if self.when(step):
            raise self.Now

    def evaluated(self, evaluation: Evaluation) -> None:
        if self.when(evaluation):
            raise self.Now


def save_start(directory: Path, seed: int) -> None:
    """Write a model to start from, of random params."""
    tokenizer = gpt_xp.train_tokenizer([story(300)], 277)
    config = gpt_xp.GPT2Config(n_vocab=277, n_ctx=37, n_embd=39, n_head=3, n_layer=2, eos_token_id=276)
    checkpoint.save(directory, random_params(config, seed), config, tokenizer)


FROZEN = {name: value for name, value in SMALL.items() if name not in SHAPE} | {"freeze": 1}


def test_accumulated_batches_are_one_large_batch(text: Path, tmp_path: Path) -> None:
    parts = gpt_xp.train([text], tmp_path / "a", **{**SMALL, "batch_size": 1, "accumulate": 5})
    whole = gpt_xp.train([text], tmp_path / "b", **SMALL)
    for a, b in zip(parts.evaluations, whole.evaluations, strict=True):
        assert a.val_loss == pytest.approx(b.val_loss, rel=2e-5)
        assert a.train_loss == (b.train_loss and pytest.approx(b.train_loss, rel=1e-5))
        assert a.tokens == b.tokens


def test_it_learns_and_keeps_the_best(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    heard: list[Evaluation] = []

    class Listens(Watcher):
        def evaluated(self, evaluation: Evaluation) -> None:
            heard.append(evaluation)

    found = gpt_xp.train([text], out, **{**SMALL, "steps": 40, "eval_every": 10}, watcher=Listens(), sample="the")
    assert isinstance(found, Training)
    first, last = found.evaluations[0], found.evaluations[-1]
    assert first.step == 0
    assert first.train_loss is None
    assert first.val_loss == pytest.approx(math.log(277), rel=0.02)  # it knows nothing
    assert last.val_loss < first.val_loss / 2
    assert found.best == min(found.evaluations, key=lambda each: each.val_loss)
    assert list(found.evaluations) == heard
    assert [each["step"] for each in log(out)] == [0, 10, 20, 30, 40]
    assert all(each.sample is not None and each.sample.startswith("the") for each in heard)
    model = gpt_xp.load(out)
    assert model.config.n_vocab == 277
    # The loss, once more, by the library on NumPy: windows of 37 tokens over the last tenth of the characters.
    whole = text.read_text(encoding="utf-8")
    val = whole[int(0.9 * len(whole)) :]
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(val)
    rows = np.array([ids[i * 37 : i * 37 + 38] for i in range((len(ids) - 1) // 37)])
    loss = float(gpt_xp.lm_loss(model.params, rows, model.config))
    assert found.best.val_loss == pytest.approx(loss, rel=1e-5)
    assert found.best.val_nats_per_character == pytest.approx(loss * len(ids) / len(val), rel=1e-5)


class Tells(Watcher):
    def __init__(self) -> None:
        self.token: str | None = None

    def spelled(self, token: str) -> None:
        self.token = token


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_in_the_text_are_plain_unless_they_are_allowed(tmp_path: Path, special: bool) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(story(300, seed) for seed in range(20)))
    tells = Tells()
    gpt_xp.train(tmp_path / "text.txt", tmp_path / "out", **SMALL, special_tokens=special, watcher=tells)
    tokenizer = gpt_xp.Tokenizer.from_directory(tmp_path / "out")
    found = corpus.open_corpus(tmp_path / "out" / "training", tokenizer, 5)
    ids = [*found.train, *found.val]
    assert ids.count(tokenizer.eos_token_id) == (19 if special else 0)
    assert tokenizer.decode(ids) == (tmp_path / "text.txt").read_text()
    assert tells.token == (None if special else "<|endoftext|>")
    with pytest.raises(SettingError, match="begun with special_tokens"):
        gpt_xp.train(out=tmp_path / "out", resume=True, special_tokens=not special)


def test_an_id_beyond_the_table_is_refused_before_a_step(tmp_path: Path) -> None:
    # JAX clamps it without a word. [PAD] was added to the tokenizer, and the table was not resized.
    save_start(tmp_path / "start", seed=1)
    there = gpt_xp.Tokenizer.from_directory(tmp_path / "start")
    gpt_xp.Tokenizer(there.encoder | {"[PAD]": 277}, there.merges, ["[PAD]"]).save(tmp_path / "start")
    (tmp_path / "text.txt").write_text((story(30) + "[PAD]") * 30)
    options = {**FROZEN, "start": str(tmp_path / "start")}
    with pytest.raises(TextError, match=r"has '\[PAD\]', token 277, and the table of this model ends at 276"):
        gpt_xp.train(tmp_path / "text.txt", tmp_path / "special", special_tokens=True, **options)
    gpt_xp.train(tmp_path / "text.txt", tmp_path / "plain", **options)


def test_a_fine_tuned_model_keeps_what_its_start_says(tmp_path: Path, text: Path) -> None:
    save_start(tmp_path / "start", seed=1)
    entries = json.loads((tmp_path / "start" / "config.json").read_text())
    stated = {"eos_token_id": [0, 24], "pad_token_id": 7, "task_specific_params": {"x": 1}}
    (tmp_path / "start" / "config.json").write_text(json.dumps(entries | stated))
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": 24, "max_length": 50}')
    (tmp_path / "start" / "chat_template.jinja").write_text("{{ x }}")
    gpt_xp.train(text, tmp_path / "out", start=str(tmp_path / "start"), **FROZEN)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries | stated == entries
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 24, "max_length": 50}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"


# --- nothing lost ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all settings that matter for going on, to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_bytes(story(3000).encode())
    gpt_xp.train([folder / "text.txt"], folder / "out", **EVERYTHING)
    return folder / "out"


MOMENTS: dict[str, Callable[[Any], bool]] = {
    "before the first step": lambda moment: isinstance(moment, Evaluation) and moment.step == 0,
    "after an evaluation": lambda moment: isinstance(moment, Evaluation) and moment.step == 6,
    "at the end": lambda moment: isinstance(moment, Evaluation) and moment.step == 7,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_to_the_same_bits(moment: str, undisturbed: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stops.Now):
        gpt_xp.train([text], out, **EVERYTHING, watcher=Stops(MOMENTS[moment]))
    text.unlink()  # it is not read again
    gpt_xp.train(out=out, resume=True)
    assert bits(out) == bits(undisturbed)
    assert log(out) == log(undisturbed)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("train.bin", 1), ("corpus.json", 1), ("state.safetensors", 1)),
        *(("model.safetensors", 2), ("train.jsonl", 2), ("state.safetensors", 2)),
    ],
)
def test_a_write_that_fails_loses_nothing(
    name: str, count: int, undisturbed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is renamed into place; a full disk or a kill before the renaming leaves the one before."""
    replace, seen = os.replace, []

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            seen.append(target)
            if len(seen) == count:
                raise OSError(28, "No space left on device")
        replace(source, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match="No space"):
            gpt_xp.train([text], out, **EVERYTHING)
    if count == 2:
        gpt_xp.load(out)  # the first checkpoint is whole
    gpt_xp.train(out=out, resume=True)
    assert bits(out) == bits(undisturbed)
    assert log(out) == log(undisturbed)
    assert not [path for path in out.rglob("*") if path.name.endswith((".part", ".tmp"))]


@pytest.fixture(scope="module")
def from_a_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a model of which a block is frozen, to its end."""
    folder = tmp_path_factory.mktemp("from_a_start")
    (folder / "text.txt").write_bytes(story(3000).encode())
    save_start(folder / "start", seed=1)
    gpt_xp.train([folder / "text.txt"], folder / "out", start=str(folder / "start"), **FROZEN)
    return folder / "out"


def test_frozen_blocks_stay_as_they_are(from_a_start: Path) -> None:
    assert any(each["is_best"] for each in log(from_a_start)[1:])
    folders = from_a_start.parent / "start", from_a_start
    before, after = (checkpoint.read(folder, "float32").params for folder in folders)
    np.testing.assert_array_equal(before["wte"], after["wte"])
    np.testing.assert_array_equal(before["wpe"], after["wpe"])
    for a, b in zip(leaves(before["blocks"][0]), leaves(after["blocks"][0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(leaves(before["blocks"][1]), leaves(after["blocks"][1]), strict=True):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("moment", ["tokenizing", "after an evaluation"])
@pytest.mark.parametrize("then", ["gone", "another"])
def test_going_on_needs_nothing_but_the_directory(
    moment: str, then: str, from_a_start: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that a run began with may be gone, or another by now, and the process may be in another directory."""
    save_start(tmp_path / "start", seed=1)
    monkeypatch.chdir(tmp_path)
    stops = Stops(MOMENTS["after an evaluation"])
    with monkeypatch.context() as patch:
        if moment == "tokenizing":
            patch.setattr(corpus, "COUNTS", "no such folder/corpus.json")
        with pytest.raises((Stops.Now, CheckpointError)):
            gpt_xp.train("text.txt", "out", start="start", **FROZEN, watcher=stops)
    shutil.rmtree(tmp_path / "start")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if then == "another":
        save_start(elsewhere / "start", seed=2)
        save_start(tmp_path / "start", seed=3)
        (elsewhere / "text.txt").write_text("Something else.\n" * 999)
    monkeypatch.chdir(elsewhere)
    if moment == "after an evaluation":
        (tmp_path / "out").rename(elsewhere / "moved")
    out = elsewhere / "moved" if moment == "after an evaluation" else tmp_path / "out"
    gpt_xp.train(out=out, resume=True)
    assert bits(out) == bits(from_a_start)
    assert log(out) == log(from_a_start)


def test_going_on_needs_no_tokenizer_from_elsewhere(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_start(tmp_path / "theirs", seed=1)
    settings = SMALL | {"vocab_size": None, "tokenizer": str(tmp_path / "theirs")}
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "COUNTS", "no such folder/corpus.json")
        with pytest.raises(CheckpointError, match=r"cannot write .*corpus\.json"):
            gpt_xp.train([text], tmp_path / "out", **settings)
    expected = (tmp_path / "theirs" / "merges.txt").read_bytes()
    shutil.rmtree(tmp_path / "theirs")
    gpt_xp.train(out=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "merges.txt").read_bytes() == expected


def test_a_run_of_an_older_version_that_lacks_its_start_is_refused(
    from_a_start: Path, text: Path, tmp_path: Path
) -> None:
    """It would need the model where it was, which may have changed."""
    shutil.copytree(from_a_start, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "training" / "start")
    with pytest.raises(SettingError, match=r"training.start, a copy of .*start .* is missing.*train in another"):
        gpt_xp.train(out=tmp_path / "out", resume=True)
    gpt_xp.train([text], tmp_path / "scratch", **SMALL)
    assert not (tmp_path / "scratch" / "training" / "start").exists()


def test_a_start_that_cannot_be_copied_leaves_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_start(tmp_path / "start", seed=1)
    out, settings = tmp_path / "out", FROZEN | {"start": str(tmp_path / "start")}
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == out / "training" / "start" / "config.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match=r"cannot save to .*start .*No space"):
            gpt_xp.train([text], out, **settings)
    with pytest.raises(SettingError, match="no run to go on with"):
        gpt_xp.train(out=out, resume=True)
    assert gpt_xp.train([text], out, **settings).steps == 7


def test_going_on_takes_the_settings_of_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stops.Now):
        gpt_xp.train([text], out, **SMALL, watcher=Stops(lambda moment: moment == 4))
    with pytest.raises(SettingError, match=r"begun with learning_rate 0\.01, not 0\.02"):
        gpt_xp.train(out=out, resume=True, learning_rate=0.02)
    with pytest.raises(SettingError, match="holds a run already"):
        gpt_xp.train([text], out, **SMALL)
    assert gpt_xp.train([text], out, resume=True, **SMALL, sample="O").evaluations[-1].sample
    again = gpt_xp.train(out=out, resume=True)  # a run that has ended
    assert again.steps == 7
    assert len(again.evaluations) == 4


def test_early_stopping(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 9.0])
    monkeypatch.setattr("gpt_xp.training.loop.TrainingRun._val_loss", lambda run: next(losses))
    out = tmp_path / "out"
    found = gpt_xp.train([text], out, **{**SMALL, "eval_every": 1, "patience": 2})
    assert (found.best.step, found.steps, found.stopped_early) == (3, 5, True)  # as good is no better
    assert gpt_xp.train(out=out, resume=True).steps == 5
    assert [each["is_best"] for each in log(out)] == [True, True, False, True, False, False]


def test_two_processes_do_not_share_a_directory(text: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out" / "training").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / "training" / ".lock"),
        pytest.raises(CheckpointError, match="another process is training"),
    ):
        gpt_xp.train([text], tmp_path / "out", **SMALL)


def test_divergence_is_told_and_the_best_is_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Program.train

    def broken(self: Program, state: Any, tokens: Any, step: int) -> Any:
        after, loss = train(self, state, tokens, step)
        return after, np.float32(np.nan) if step == 4 else loss

    monkeypatch.setattr(Program, "train", broken)
    out = tmp_path / "out"
    with pytest.raises(NumericalError, match=r"diverged: the loss is nan at step 5.*step 3.*learning rate below 0\.01"):
        gpt_xp.train([text], out, **SMALL)
    assert gpt_xp.load(out).config.n_vocab == 277
    assert [each["step"] for each in log(out)] == [0, 3]


def test_a_huge_learning_rate_diverges(text: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="diverged"):
        gpt_xp.train([text], tmp_path / "out", **{**SMALL, "learning_rate": 1e9, "steps": 30})


def test_a_damaged_state_is_told(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gpt_xp.train([text], out, **SMALL)
    path = out / "training" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        gpt_xp.train(out=out, resume=True)
    assert load_state(tmp_path, {}) is None


# --- what cannot be -------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[GptXpError], str]] = [
    ({"steps": 0}, SettingError, "steps must be a whole number of at least 1, not 0"),
    ({"batch_size": 2.5}, SettingError, "batch_size must be a whole number"),
    ({"average": 1.0}, SettingError, "average must be a number of at least 0 and below 1"),
    ({"learning_rate": 0}, SettingError, "learning_rate must be more than 0"),
    ({"learning_rate": math.nan}, SettingError, "learning_rate must be a number"),
    ({"val_fraction": 0.0}, SettingError, "val_fraction must be more than 0"),
    ({"save_dtype": "int8"}, SettingError, "save_dtype must be float32 or float16"),
    ({"dtype": "float16"}, SettingError, "dtype must be float32 or bfloat16"),
    ({"freeze": 1}, SettingError, "name the model to start from (start)"),
    ({"start": "shakespeare", "n_layer": 2}, SettingError, "n_layer is that of the model to start from"),
    ({"start": "shakespeare", "freeze": 7}, SettingError, "freeze 7: the model has 6 blocks"),
    ({"start": "shakespeare", "seq_len": 300}, SettingError, "seq_len 300 is more than the context"),
    ({"start": "shakespear"}, gpt_xp.errors.ModelNotFoundError, "shakespear"),
    ({"tokenizer": "shakespeare", "vocab_size": 300}, SettingError, "tokenizer and vocab_size exclude each other"),
    ({"n_head": 5, "n_embd": 39}, gpt_xp.errors.ConfigError, "n_embd 39 cannot be split over n_head 5"),
    ({"dtype": "bfloat16"}, BackendError, "bfloat16"),
    ({"plot": "a.txt"}, SettingError, "its name must end in"),
    ({"vocab_size": 100}, GptXpError, "100"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_settings_that_cannot_be(
    wrong: dict[str, Any], error: type[GptXpError], message: str, text: Path, tmp_path: Path
) -> None:
    settings = (
        {"n_layer": 1, "n_head": 1, "n_embd": 3, "vocab_size": 260} if not {"start", "tokenizer"} & {*wrong} else {}
    )
    with pytest.raises(error, match=re.escape(message)):
        gpt_xp.train([text], tmp_path / "out", **{**settings, **wrong})
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_text_that_cannot_be(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be.\n" * 3)
    cases: list[tuple[list[Any], dict[str, Any], type[GptXpError], str]] = [
        ([], {}, SettingError, "nothing to train on"),
        ([tmp_path / "none.txt"], {}, TextError, "none.txt"),
        ([short], {"tokenizer": "shakespeare"}, TextError, "each row of a batch takes 256 and one more"),
        ([short], {"tokenizer": "shakespeare", "seq_len": 5, "val_fraction": 0.01}, TextError, "to validate on"),
    ]
    for i, (files, settings, error, message) in enumerate(cases):
        with pytest.raises(error, match=re.escape(message)):
            gpt_xp.train(files, tmp_path / f"out{i}", **settings)
    with pytest.raises(SettingError, match="nowhere to write"):
        gpt_xp.train([short])
    with pytest.raises(SettingError, match="no run to go on with"):
        gpt_xp.train(out=tmp_path / "empty", resume=True)


def test_mistakes_leave_no_run_behind(text: Path, tmp_path: Path) -> None:
    with pytest.raises(GptXpError):
        gpt_xp.train([text], tmp_path / "out", **{**SMALL, "n_head": 5})
    gpt_xp.train([text], tmp_path / "out", **SMALL)  # the same command, mended
