"""Options, their variables, and the names that errors give them."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from commands import Result

import gpt_xp
from gpt_xp.cli.group import cli
from gpt_xp.cli.wording import Option, reworded
from gpt_xp.errors import SettingError
from gpt_xp.scoring.windows import Windows
from gpt_xp.settings import GenerationSettings
from gpt_xp.training.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("no_variables")
Call = Callable[..., Result]


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command


def options(command: click.Command) -> Iterator[Option]:
    return (each for each in command.params if isinstance(each, Option) and not each.hidden)


def readers() -> dict[str, dict[str, Option]]:
    """Return each variable with the options that it sets, by command."""
    found: dict[str, dict[str, Option]] = {}
    for name, command in commands():
        for option in options(command):
            found.setdefault(str(option.envvar), {})[name] = option
    return found


# --- variables --------------------------------------------------------------------------------------------------------


def test_every_option_has_a_variable_of_its_name_or_of_its_command_s_too() -> None:
    for name, command in commands():
        for option in (each for each in command.params if isinstance(each, click.Option) and not each.hidden):
            assert isinstance(option, Option), f"{name} {option.opts}"
            own = option.long.removeprefix("--").replace("-", "_").upper()
            assert option.envvar in (f"GPT_XP_{own}", f"GPT_XP_{name.upper()}_{own}")
    assert {"GPT_XP_MODEL", "GPT_XP_MAX_TOKENS", "GPT_XP_STOP", "GPT_XP_TRAIN_BATCH_SIZE"} <= readers().keys()


def test_a_variable_means_the_same_in_each_command_that_reads_it() -> None:
    """A value that is right for one command is right for the others."""
    for variable, found in readers().items():
        kinds = {(repr(each.type), each.multiple, each.is_flag, each.nargs) for each in found.values()}
        assert len(kinds) == 1, f"{variable}: {kinds}"


def test_the_commands_that_share_a_variable() -> None:
    shared = {variable: sorted(found) for variable, found in readers().items() if len(found) > 1}
    models = ["bench", "bulk", "compare", "generate", "look", "score", "tokens"]
    batches = ["bulk", "generate", "score"]
    loading = [*batches[:2], "look", "score"]
    sampling = ("MAX_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "MIN_P", "REPETITION_PENALTY", "STOP", "SEED")
    sampling += ("NUM_SAMPLES", "IGNORE_EOS", "SPECULATE", "LOGPROBS")
    assert (
        shared
        == {
            "GPT_XP_MODEL": models,
            "GPT_XP_OFFLINE": sorted([*models, "conform"]),
            **{f"GPT_XP_{name}": loading for name in ("BACKEND", "DEVICE", "DTYPE", "QUANTIZE")},
            **{f"GPT_XP_{name}": ["bulk", "generate"] for name in sampling},
            **{f"GPT_XP_{name}": ["bulk", "score"] for name in ("BY", "WINDOW", "STRIDE")},
            "GPT_XP_MESH": ["backends", *loading, "train"],
            "GPT_XP_HOSTS": ["generate", "score", "train"],
            "GPT_XP_BATCH_SIZE": batches,  # rows that are computed together: no result depends on it
            "GPT_XP_THREADS": ["bench", "bulk", "compare", "generate", "look", "score", "train"],
            "GPT_XP_SPECIAL_TOKENS": ["bulk", "generate", "look", "score", "tokens", "train"],
            "GPT_XP_DTYPES": ["bench", "compare"],
            "GPT_XP_MARKDOWN": ["bench", "compare", "conform"],
            "GPT_XP_JSON": ["backends", *models[:3], "conform", "generate", "models", "score", "tokens", "train"],
        }
    )


def test_a_mesh_of_a_variable_is_left_aside_by_other_backends(call: Call) -> None:
    assert call("A", "-n", "1", "--backend", "numpy", GPT_XP_MESH="data=99", GPT_XP_HOSTS="127.0.0.1:1,2,0").code == 0
    result = call("A", "-n", "1", "--backend", "numpy", "--mesh", "data=2")
    assert (result.code, result.out) == (1, "")
    assert result.err == "gpt-xp: error: numpy computes on one device; a mesh needs jax: take the backend jax\n"


def test_a_seed_for_generating_is_none_for_scoring(call: Call, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be")
    variables = {"GPT_XP_SEED": "5000000000"}
    assert call("score", str(tmp_path / "text.txt"), **variables).code == 0
    found = json.loads(call("A", "-n", "1", "--temperature", "1", "--json", **variables).out)
    assert found["seed"] == 5_000_000_000


@pytest.mark.parametrize(
    ("convention", "variables"),
    [
        ("lm-eval", {"GPT_XP_STRIDE": "7", "GPT_XP_CROPS": "3"}),
        ("nanogpt", {"GPT_XP_STRIDE": "7", "GPT_XP_WINDOW": "5", "GPT_XP_CROPS": "3"}),
        ("huggingface", {"GPT_XP_CROPS": "3"}),
    ],
)
def test_a_variable_for_another_convention_is_left_aside(
    call: Call, tmp_path: Path, convention: str, variables: dict[str, str]
) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.")
    result = call("score", "--convention", convention, str(tmp_path / "text.txt"), "--json", **variables)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["stride"] is None) == (convention != "huggingface")
    assert "GPT_XP_STRIDE" not in variables or found["stride"] is None


def test_a_prompt_is_more_than_the_variable_of_a_prompt_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("B\n")
    variables = {"GPT_XP_PROMPT_FILE": str(tmp_path / "prompts")}
    assert call("A", "-n", "2", **variables) == call("A", "-n", "2")
    assert '"prompt": "B"' in call("-n", "2", **variables).out
    assert call("A", "--prompt-file", str(tmp_path / "prompts")).code == 2


def test_names_of_picogpt_are_more_than_the_variable_of_the_model(
    call: Call, tmp_path: Path, shakespeare: gpt_xp.Model
) -> None:
    shakespeare.save(tmp_path / "124M")
    assert call("A", "-n", "1", "--models_dir", str(tmp_path), GPT_XP_MODEL="no-such-model").code == 0


@pytest.mark.parametrize(
    ("typed", "variables", "left"),
    [
        (["--from", "shakespeare"], {"N_LAYER": "3", "TOKENIZER": "x", "VOCAB_SIZE": "300", "FREEZE": "1"}, {"freeze"}),
        (["--n-layer", "2"], {"FROM": "shakespeare", "FREEZE": "1", "N_HEAD": "4"}, {"n_head"}),
        (["--vocab-size", "300"], {"TOKENIZER": "x"}, set()),
        (["--tokenizer", "shakespeare"], {"VOCAB_SIZE": "300"}, set()),
        ([], {"FREEZE": "2", "STEPS": "7"}, {"steps"}),
        ([], {"FROM": "x", "FREEZE": "2", "N_CTX": "7"}, {"from", "freeze"}),
        (["--resume"], {"LEARNING_RATE": "0.5", "SAMPLE": "To be", "FROM": "x", "TRAIN_SEED": "3"}, {"sample"}),
    ],
)
def test_variables_for_another_run_are_left_aside(
    call: Call, monkeypatch: pytest.MonkeyPatch, typed: list[str], variables: dict[str, str], left: set[str]
) -> None:
    seen: dict[str, Any] = {}

    def train(data: object, out: object, **given: Any) -> None:
        seen.update(given)
        raise SettingError("seen")

    monkeypatch.setattr("gpt_xp.train", train)
    call("train", "--data", __file__, "--out", "x", *typed, **{f"GPT_XP_{name}": v for name, v in variables.items()})
    given = {name.removeprefix("--").replace("-", "_") for name in typed if name.startswith("--")}
    names = {{"start": "from"}.get(name, name) for name in seen.keys() - {"watcher"}}
    assert names - given - {"resume"} == left


# --- names in errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        (["A"], {"GPT_XP_SEED": "-1"}, "GPT_XP_SEED must be a whole number"),
        (["A"], {"GPT_XP_TOP_K": "-1"}, "GPT_XP_TOP_K must be a whole number"),
        (["A"], {"GPT_XP_MAX_TOKENS": "many"}, "Invalid value for GPT_XP_MAX_TOKENS: 'many'"),
        (["A"], {"GPT_XP_BACKEND": "nump"}, "(GPT_XP_BACKEND is set)"),
        (["A"], {"GPT_XP_DEVICE": "cuda:7"}, "(GPT_XP_DEVICE is set)"),
        (["A"], {"GPT_XP_MODEL": "no-such"}, "(GPT_XP_MODEL is set)"),
        (["A"], {"GPT_XP_MODEL": "no-such", "GPT_XP_DTYPE": "bfloat16"}, "(GPT_XP_DTYPE is set)"),
        (["score", "TEXT"], {"GPT_XP_SCORE_SEED": "-1"}, "Invalid value for GPT_XP_SCORE_SEED"),
        (["score", "TEXT"], {"GPT_XP_WINDOW": "999"}, "GPT_XP_WINDOW must be from 2 to 256"),
        (["score", "TEXT", "--stride", "9"], {"GPT_XP_CONVENTION": "lm-eval"}, "(GPT_XP_CONVENTION is set)"),
        (["compare"], {"GPT_XP_COMPARE_MAX_TOKENS": "999"}, "GPT_XP_COMPARE_MAX_TOKENS is 999"),
        (["bench"], {"GPT_XP_BENCH_MAX_TOKENS": "999"}, "GPT_XP_BENCH_MAX_TOKENS 999 after 128 tokens"),
        (["bench", "-n", "999"], {}, "--max-tokens 999 after 128 tokens of a prompt (--context) does not fit"),
        (["compare", "-n", "999"], {}, "--max-tokens is 999"),
        (["score", "TEXT", "--window", "999"], {}, "--window must be from 2 to 256"),
        (["train", "--data", "TEXT", "--out", "x", "--seq-len", "999"], {}, "--seq-len 999 is more than the context"),
        (["train", "--data", "TEXT", "--out", "x"], {"GPT_XP_SEQ_LEN": "999"}, "GPT_XP_SEQ_LEN 999 is more than"),
        (
            ["train", "--data", "TEXT", "--out", "x", "--n-head", "7"],
            {},
            "--n-embd 192 cannot be split over --n-head",
        ),
        (["train", "--data", "TEXT", "--out", "x", "--from", "shakespeare", "--n-ctx", "7"], {}, "--n-ctx is that of"),
        (["train", "--data", "TEXT", "--out", "x", "--freeze", "7"], {}, "name the model to start from (--from)"),
    ],
)
def test_errors_name_the_option_or_its_variable(
    call: Call, tmp_path: Path, args: list[str], variables: dict[str, str], message: str
) -> None:
    pytest.importorskip("optax") if args[0] == "train" else None
    (tmp_path / "text.txt").write_text("To be, or not to be " * 20)
    places = {"TEXT": str(tmp_path / "text.txt"), "x": str(tmp_path / "out")}
    result = call(*(places.get(arg, arg) for arg in args), **variables)
    assert result.code in (1, 2)
    assert message in result.err
    assert not (tmp_path / "out").exists()


def library_errors() -> Iterator[tuple[str, str, str]]:
    """Yield the messages of the library for a value that no setting can have, with command and setting."""
    for command, kind, given in (
        ("generate", GenerationSettings, {}),
        ("score", Windows, {"convention": "huggingface"}),
        ("train", TrainingSettings, {"data": ("x",)}),
    ):
        for field in (
            each for each in dataclasses.fields(kind) if each.name not in ("data", "val")
        ):  # any path will do
            for value in (-1, 2.5, "x", float("nan")):
                try:
                    kind(**{**given, field.name: value})  # type: ignore[operator]
                except SettingError as error:
                    yield command, field.name, str(error)


def test_no_error_of_a_setting_shows_python_s_name() -> None:
    found = dict(commands())
    seen = set()
    for command, name, message in library_errors():
        with click.Context(found[command]) as context:
            shown = reworded(message, context)
        option = next(each for each in options(found[command]) if each.setting == name)
        assert shown.startswith(f"{option.long} "), shown
        assert not re.search(rf"(?<![\w-]){name}(?![\w-])", shown.removeprefix(option.long)), shown
        seen.add(name)
    assert seen >= {"top_k", "seed", "stride", "n_layer", "seq_len", "learning_rate", "dtype", "convention"}


def test_what_is_not_a_setting_is_left() -> None:
    found = dict(commands())
    with click.Context(found["train"]) as context:
        for message in (
            "/runs/n_ctx/7 holds a run",
            "runs/n_ctx.json is damaged",
            'the field "n_ctx" is no number',
            "'seq_len'",
            "seeds must be odd",
            "the data has steps, of which seed is one",
            "/tmp/n_ctxs/x is empty",
            "a --seed-like thing",
        ):
            assert reworded(message, context) == message


# --- what does nothing is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--top-k", "5"], "--top-k has no effect without a temperature: add --temperature 1"),
        (["--top-p", "0.5", "--min-p", "0.1"], "--top-p and --min-p have no effect without a temperature"),
        (["--seed", "1"], "--seed has no effect without a temperature"),
        (["--json", "--seed", "1"], "--seed has no effect without a temperature"),
        (["--json", "--echo"], "--echo has no effect on JSON"),
        (["--batch-size", "2"], "--batch-size has no effect without --prompt-file"),
        (["--stop", "\\n"], r"--stop '\n' holds a backslash and a letter; in bash and zsh, $'\n' is the character"),
        (["--stop", "a\\tb"], r"--stop 'a\tb' holds a backslash"),
        (["-n", "10000"], "the context of 256 tokens is full: 256 of 10000 tokens were generated"),
    ],
)
def test_an_option_without_effect_is_one_line_on_stderr(call: Call, args: list[str], told: str) -> None:
    plain = [arg for arg in args if arg == "--json"]
    result = call("A", *itertools.chain([] if "-n" in args else ["-n", "2"]), *args)
    assert result.code == 0
    assert result.err.startswith(f"gpt-xp: {told}")
    assert result.err.count("\n") == 1
    if not plain and "-n" not in args:
        assert result.out == call("A", "-n", "2").out


@pytest.mark.parametrize(
    ("args", "variables"),
    [
        (["--top-k", "5", "--seed", "1", "--temperature", "1"], {}),
        (["--repetition-penalty", "1.5"], {}),
        (["--stop", "\n", "--stop", "\\"], {}),
        ([], {"GPT_XP_TOP_K": "5", "GPT_XP_SEED": "1", "GPT_XP_ECHO": "1", "GPT_XP_BATCH_SIZE": "2"}),
        (["--json"], {"GPT_XP_ECHO": "1"}),
    ],
)
def test_what_has_an_effect_or_is_set_once_for_all_is_not_told(
    call: Call, args: list[str], variables: dict[str, str]
) -> None:
    assert call("A", "-n", "2", *args, **variables).err == ""


def test_samples_that_fill_the_context_are_one_line(call: Call) -> None:
    args = ("--temperature", "1", "--seed", "1", "--num-samples", "2", "--ignore-eos", "-n", "300")
    assert call("x " * 120, *args).err == "gpt-xp: the context of 256 tokens is full: 17 of 300 tokens were generated\n"


# --- words of other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["list"], "gpt-xp models"),
        (["pull", "124M"], "gpt-xp models pull MODEL"),
        (["run", "124M", "To be"], 'gpt-xp -m MODEL "PROMPT"'),
        (["run"], 'gpt-xp -m MODEL "PROMPT"'),
        (["version"], "gpt-xp --version"),
    ],
)
def test_a_command_of_another_tool_is_refused_with_a_hint(call: Call, args: list[str], hint: str) -> None:
    result = call(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith(
        f"Error: there is no command {args[0]!r}; you may mean: {hint} (as a prompt: gpt-xp -- {args[0]})\n"
    )
    assert call("-n", "1", "--", args[0]).code == 0


def test_help_is_a_command_too(call: Call) -> None:
    assert call("help") == call("--help")
    assert call("help", "train") == call("train", "--help")
    assert call("help", "--help") == call("--help")
    assert call("-n", "1", "--", "help").code == 0
    assert "one too many" in call("help", "me").err


# --- text that is not UTF-8 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["caf\udce9"], ["tokens", "caf\udce9"], ["A", "--stop", "caf\udce9"], ["compare", "caf\udce9"],
        ["score", "--choices", "caf\udce9", "a"], ["score", "--choices", "a", "caf\udce9"],
        ["train", "--data", __file__, "--out", "x", "--sample", "caf\udce9"],
        ["tokenizer", "train", "--vocab-size", "300", "--out", "x", "--special", "caf\udce9", __file__],
    ],
)  # fmt: skip
def test_an_argument_that_is_not_utf8_gets_advice_for_those_who_type(call: Call, args: list[str]) -> None:
    result = call(*args)
    assert (result.code, result.out) == (2, "")
    assert "character 4 is byte 0xe9, and the text is not UTF-8. Set the terminal to UTF-8, or pipe" in result.err
    assert "decode()" not in result.err


def test_a_folder_whose_name_is_not_utf8_is_a_folder(call: Call, tmp_path: Path, shakespeare: gpt_xp.Model) -> None:
    folder = f"{tmp_path}/caf\udce9"
    try:
        Path(folder).mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    shakespeare.save(folder)
    assert call("A", "-n", "1", "-m", folder).code == 0
