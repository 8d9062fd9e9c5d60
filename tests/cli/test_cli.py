"""The command line. Real processes where terminals, pipes, signals and exit codes decide, else calls in this one."""

import json
import platform
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from commands import PATIENCE, Result, posix, process, start
from safetensors.numpy import load_file, save_file

import gpt_xp

pytestmark = pytest.mark.usefixtures("no_variables")


def continuation(model: gpt_xp.Model, prompt: str, **settings: object) -> str:
    return str(model.generate(prompt, **settings).text)


# What is printed where


def test_the_continuation_and_nothing_else_goes_to_stdout(call, shakespeare):
    settings = {"max_tokens": 12, "temperature": 0.8, "seed": 1}
    result = call("ROMEO:", "-n", "12", "--temperature", "0.8", "--seed", "1", "--stats")
    assert result.code == 0
    assert result.out == continuation(shakespeare, "ROMEO:", **settings) + "\n"
    assert result.err.startswith("gpt-xp: shakespeare on numpy, cpu, float32; prompt 2 tokens at ")
    assert result.err.count("\n") == 1
    for part in ("; generated 12 tokens at ", " tok/s; first token after ", "; peak memory "):
        assert part in result.err


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_head_that_is_not_used_is_one_line_on_stderr(call, shakespeare, tmp_path, action):
    shutil.copytree(gpt_xp.hub.find.BUNDLED / "shakespeare", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"score.weight": np.ones((2, 192), np.float32)}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter(action)  # as python -W does
        result = call("ROMEO:", "-n", "5", "-m", str(tmp_path))
    assert (result.code, result.out) == (0, continuation(shakespeare, "ROMEO:", max_tokens=5) + "\n")
    assert result.err.startswith(f"gpt-xp: {tmp_path} is loaded without score.weight: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--top-k", "5"], {"top_k": 5}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--min-p", "0.2"], {"min_p": 0.2}),
        (["--repetition-penalty", "1.5"], {"repetition_penalty": 1.5}),
        (["--stop", "lord", "--stop", "e "], {"stop": ["lord", "e "]}),
        (["--ignore-eos"], {"ignore_eos": True}),
    ],
)
def test_each_sampling_option_reaches_the_library(call, shakespeare, options, settings):
    settings = {"temperature": 1.0, "seed": 7, "max_tokens": 30, **settings}
    result = call("My ", "--temperature", "1", "--seed", "7", "-n", "30", "--json", *options)
    record = json.loads(result.out)
    assert record["text"] == continuation(shakespeare, "My ", **settings)
    assert {name: record["settings"][name] for name in settings if name != "seed"} == {
        name: value for name, value in settings.items() if name != "seed"
    }


def test_echo_prints_the_prompt_first(call):
    plain = call("My lord", "-n", "5")
    assert call("My lord", "-n", "5", "--echo").out == "My lord" + plain.out


def test_samples_are_printed_under_their_numbers(call, shakespeare):
    result = call("A", "-n", "6", "--num-samples", "2", "--temperature", "1", "--seed", "3", "--echo")
    first, second = shakespeare.generate("A", max_tokens=6, num_samples=2, temperature=1.0, seed=3)
    assert first.text != second.text
    assert result.out == f"--- sample 1 ---\nA{first.text}\n--- sample 2 ---\nA{second.text}\n"


def test_json_has_everything_about_each_sample(call, shakespeare):
    args = ("é", "-n", "6", "--num-samples", "2", "--temperature", "1", "--seed", "3", "--json", "--logprobs")
    result = call(*args, "--stop", "\n")
    expected = shakespeare.generate("é", max_tokens=6, num_samples=2, temperature=1.0, seed=3, stop="\n")
    lines = result.out.splitlines()
    assert result.out.isascii()
    assert result.err == ""
    assert len(lines) == 2
    for sample, (line, generation) in enumerate(zip(lines, expected, strict=True)):
        record = json.loads(line)
        stats = record.pop("batch")
        assert record.pop("logprobs") == pytest.approx(generation.logprobs, rel=1e-4)
        assert record == {
            "schema": 2,
            "type": "result",
            "prompt": "é",
            "sample": sample,
            "text": generation.text,
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason,
            "seed": 3,
            "settings": {
                "max_tokens": 6, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None,
                "repetition_penalty": None, "stop": ["\n"], "num_samples": 2, "ignore_eos": False,
                "special_tokens": False, "speculate": False,
            },
            "model": "shakespeare",
            "backend": "numpy",
            "device": "cpu",
            "dtype": "float32",
            "quantize": None,
            "versions": {
                "gpt_xp": gpt_xp.__version__,
                "python": platform.python_version(),
                "numpy": shakespeare.backend.version,
            },
        }  # fmt: skip
        assert stats["rows"] == 2
        assert stats["prompt_tokens"] == 4
        assert stats["generated_tokens"] == sum(len(each.token_ids) for each in expected)
        assert stats["decode_tokens_per_second"] > 0


def test_json_has_logprobs_only_when_asked(call):
    assert "logprobs" not in json.loads(call("A", "-n", "2", "--json").out)


def test_logprobs_are_a_table_on_stderr(call, shakespeare):
    result = call("ROMEO:", "-n", "3", "--logprobs")
    expected = shakespeare.generate("ROMEO:", max_tokens=3)
    header, *rows = (line.split() for line in result.err.splitlines())
    assert header == ["id", "token", "logprob", "probability"]
    assert [int(row[0]) for row in rows] == expected.token_ids
    assert [row[1] for row in rows] == [shakespeare.tokenizer.decoder[id] for id in expected.token_ids]
    assert [float(row[2]) for row in rows] == pytest.approx(expected.logprobs, abs=1e-3)
    assert result.out == expected.text + "\n"


def test_a_seed_is_drawn_and_told(call):
    args = ("The ", "--temperature", "1.5", "-n", "20")
    first, second = call(*args), call(*args)
    assert first.out != second.out
    prefix, seed = first.err.rstrip().rsplit(" ", 1)
    assert prefix == "gpt-xp: seed"
    again = call(*args, "--seed", seed)
    assert again.out == first.out
    assert again.err == ""
    record = json.loads(call(*args, "--json").out)
    assert call(*args, "--seed", str(record["seed"])).out == record["text"] + "\n"
    assert json.loads(call("The ", "-n", "1", "--json").out)["seed"] is None  # greedy: there is nothing to draw


# Where the prompt comes from


def test_stdin_is_the_prompt_where_there_is_none(call):
    expected = call("My lord", "-n", "5").out
    assert call("-n", "5", stdin=b"My lord\n").out == expected
    assert call("-n", "5", stdin=b"My lord\r\n").out == expected
    assert call("-", "-n", "5", stdin=b"My lord").out == expected
    assert call("-n", "5", stdin=b"My lord\n\n").out == call("My lord\n", "-n", "5").out


def test_a_dash_joins_stdin_and_the_prompt_as_they_are(call):
    def prompt(*args: str) -> str:
        return str(json.loads(call(*args, "-n", "1", "--json", stdin="Être \n".encode()).out)["prompt"])

    assert prompt("-", "TL;DR:") == "Être TL;DR:"
    assert prompt("TL;DR:", "-") == "TL;DR:Être "


def test_after_two_dashes_everything_is_prompt(call):
    def prompt(*args: str, stdin: bytes = b"") -> Result:
        result = call("-n", "1", "--json", *args, stdin=stdin)
        assert result.err == ""
        return json.loads(result.out)["prompt"]

    assert prompt("--", "backends") == "backends"
    assert prompt("--", "--help") == "--help"
    assert prompt("--", "-", stdin=b"not read") == "-"
    assert prompt("-", "--", "-x", stdin=b"read") == "read-x"


def test_an_empty_prompt_starts_from_the_end_of_text_token(call, shakespeare):
    assert call("", "-n", "8").out == continuation(shakespeare, "", max_tokens=8) + "\n"


@pytest.mark.parametrize("stdin", [b"", b"\n"])
@pytest.mark.parametrize("args", [(), ("-",), ("tokens",)])
def test_nothing_on_stdin_is_no_prompt(call, args, stdin):
    result = call(*args, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert "no text was given, and stdin is empty" in result.err


def test_several_words_need_quotes(call):
    result = call("Alan", "Turing", "was")
    assert (result.code, result.out) == (2, "")
    assert "'was' is one too many: put quotes around it" in result.err
    assert call("-", "-", stdin=b"x").code == 2
    assert call("a", "-", "b", stdin=b"x").code == 2


@pytest.mark.parametrize(
    ("args", "name"),
    [(["backend"], "backends"), (["--json", "backends"], "backends"), (["token", "a"], "tokens")],
)
def test_a_word_close_to_a_command_is_a_prompt_and_gets_a_hint(call, args, name):
    result = call(*args, "-n", "1")
    assert result.err.startswith("hint: ")
    assert f"a command's name comes first: gpt-xp {name}\n" in result.err
    if len(args) == 1:
        assert result.out == call("--", args[0]).out[: len(result.out) - 1] + "\n"


def test_other_prompts_get_no_hint(call):
    for args in (["To be"], ["generate", "backend"], ["The"]):
        assert call(*args, "-n", "1").err == ""


@posix
def test_a_prompt_does_not_wait_for_an_open_pipe():
    running = start("A", "-n", "2", stdin=subprocess.PIPE)
    try:
        assert running.wait(timeout=PATIENCE) == 0
    finally:
        running.communicate()


# Wrong usage, and errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "Error: --temperature must be 0 (greedy) or a number"),
        (["--temperature", "nan"], "Error: --temperature must be"),
        (["--temperature", "hot"], "'hot' is not a valid float"),
        (["--top-p", "0"], "Error: --top-p must be a number above 0"),
        (["--top-k", "-1"], "Error: --top-k must be a whole number"),
        (["--seed", "-1"], "Error: --seed must be a whole number"),
        (["--stop", ""], "--stop must be one or several strings of at least one character, not ''"),
        (["-n", "0"], "0 is not in the range x>=1"),
        (["--num-samples", "0"], "0 is not in the range x>=1"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--dtype", "int8"], "'int8' is not one of 'float32'"),
        (["--temperatur", "1"], "Did you mean"),
        (["-5"], 'A prompt that begins with "-" goes after "--".'),
        (["--model", ".", "--model_size", "124M"], "not both"),
    ],
)
def test_wrong_usage_is_exit_code_2_before_a_model_is_looked_for(call, args, message):
    # The model does not exist, which would be exit code 1.
    result = call("A", "--model", "no-such-model", *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "--help" in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backend", "nump"], "there is no backend 'nump'; there are: numpy"),
        (["--model", "no-such"], "there is no directory 'no-such', and no model of that name"),
        (["--model", __file__], f"{__file__} is not a directory: give the directory of a model, not a file in it"),
        (["--device", "cuda:0"], "numpy has no device 'cuda:0'"),
        (["--dtype", "float16"], "numpy does not compute in float16"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(call, args, message):
    result = call("A", *args)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"gpt-xp: error: {message}")
    assert result.err.count("\n") == 1


def test_a_prompt_that_does_not_fit_prints_nothing(call):
    result = call("x " * 150, "--echo")
    assert result == (
        1, "", "gpt-xp: error: the prompt has 300 tokens, and the context of this model holds 256: shorten it by 44\n",
    )  # fmt: skip


def test_a_bug_is_not_hidden(call, monkeypatch):
    monkeypatch.setattr("gpt_xp.cli.generate.print_text", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("A")


# Options and their variables


def test_variables_stand_for_options(call):
    assert call("A", GPT_XP_MAX_TOKENS="3").out == call("A", "-n", "3").out
    assert call("A", "-n", "3", GPT_XP_MAX_TOKENS="9").out == call("A", "-n", "3").out
    assert json.loads(call("A", "-n", "1", GPT_XP_JSON="1").out)["schema"] == 2
    result = call("A", GPT_XP_MAX_TOKENS="many")
    assert result.code == 2
    assert "Invalid value for GPT_XP_MAX_TOKENS: 'many'" in result.err


def test_the_variable_of_stop_is_a_json_list(call):
    record = json.loads(call("ROMEO:", "--json", GPT_XP_STOP='[", my", "\\n\\n"]').out)
    assert record["settings"]["stop"] == [", my", "\n\n"]
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize("value", ["END", '"END"', "[1]", "["])
def test_a_malformed_variable_of_stop_is_wrong_usage(call, value):
    result = call("A", GPT_XP_STOP=value)
    assert result.code == 2
    assert "GPT_XP_STOP must be a JSON list of strings" in result.err
    assert value in result.err


def test_names_of_picogpt(call, shakespeare, tmp_path):
    expected = call("A", "-n", "3").out
    assert call("A", "--n_tokens_to_generate", "3").out == expected
    shakespeare.save(tmp_path / "124M")
    shakespeare.save(tmp_path / "355M")
    record = json.loads(call("A", "-n", "3", "--json", "--models_dir", str(tmp_path), "--model_size", "355M").out)
    assert (record["text"], record["model"]) == (expected[:-1], str(tmp_path / "355M"))
    assert json.loads(call("A", "--json", "--models_dir", str(tmp_path)).out)["model"] == str(tmp_path / "124M")
    assert "774M is not on this machine" in call("A", "--model_size", "774M", "--offline").err


def test_no_model_is_the_bundled_one_even_beside_a_directory_of_its_name(call, monkeypatch, tmp_path):
    (tmp_path / "shakespeare").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("A", "-n", "1").code == 0
    assert call("A", "-n", "1", "--model", "shakespeare").code == 1


def test_jax_writes_the_same_text_as_numpy():
    pytest.importorskip("jax")
    args = ("ROMEO:", "--temperature", "0.8", "--seed", "1", "-n", "60", "--json", "--threads", "1")
    on_numpy, on_jax = (json.loads(process(*args, "-b", name).out) for name in ("numpy", "jax"))
    assert on_jax["backend"] == "jax"
    assert on_jax["text"] == on_numpy["text"]
    assert on_jax["token_ids"] == on_numpy["token_ids"]
