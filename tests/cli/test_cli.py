"""The command line. Real processes where terminals, pipes, signals and exit codes decide, else calls in this one."""

import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from commands import COMMAND, PATIENCE, Result, Terminal, posix, process, start
from safetensors.numpy import load_file, save_file

import gpt_xp
from gpt_xp.cli import main
from gpt_xp.cli.group import cli
from gpt_xp.cli.output import waiting

# The bundled model is done before a signal can reach it.
SLOW = """
import sys, time
from gpt_xp.generation.decoder import Decoder
decode = Decoder.decode
def slow(*args):
    time.sleep(0.02)
    if not sys.stderr.isatty():
        print("a token", file=sys.stderr, flush=True)
    return decode(*args)
Decoder.decode = slow
from gpt_xp.cli import main
main()
"""
SLOW_COMMAND = [sys.executable, "-c", SLOW]
LONG = ("--max-tokens", "250", "--ignore-eos")


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


@posix
def test_closed_streams():
    shell = ["sh", "-c", f'exec "{sys.executable}" -m gpt_xp "$@"']
    result = process("sh", command=[shell[0], shell[1], shell[2] + " <&-"])
    assert result == (1, "", "gpt-xp: error: stdin is closed: expected text\n")
    result = process("sh", "A", command=[shell[0], shell[1], shell[2] + " >&-"])
    assert result == (1, "", "gpt-xp: error: cannot write to stdout: it is closed\n")


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


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


# The other commands


def test_backends_lists_what_is_here_and_what_is_missing(call, monkeypatch):
    device = gpt_xp.backend.DeviceInfo("cuda:0", "GPU X", 80_000_000_000)
    infos = [
        gpt_xp.BackendInfo("numpy", "2.3", (gpt_xp.backend.DeviceInfo("cpu", "2 cores", None),)),
        gpt_xp.BackendInfo("jax", "0.10", (device, device)),
        gpt_xp.BackendInfo("cupy", problem="cupy is not installed", fix="pip install it"),
    ]
    monkeypatch.setattr("gpt_xp.cli.backends.find_backends", lambda: infos)
    assert call("backends", GPT_XP_BACKEND="jax").out == (
        "   backend  installed  devices\n"
        "   cupy     no         cupy is not installed\n"
        "                       pip install it\n"
        "*  jax      0.10       cuda:0 (GPU X, 80.0 GB)\n"
        "                       cuda:0 (GPU X, 80.0 GB)\n"
        "   numpy    2.3        cpu (2 cores)\n"
        "* the default; choose another with --backend or GPT_XP_BACKEND\n"
    )
    record = json.loads(call("backends", "--json").out)
    assert (record["schema"], record["default"]) == (2, "numpy")
    assert record["backends"][1]["devices"][0] == {"name": "cuda:0", "kind": "GPU X", "memory": 80_000_000_000}
    assert record["backends"][0]["fix"] == "pip install it"


def test_backends_goes_on_where_a_library_cannot_start(call, monkeypatch):
    def fail(cls: type) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr("gpt_xp_backends.numpy_backend.NumPyBackend.info", classmethod(fail))
    result = call("backends")
    assert result.code == 0
    assert "it fails to start: RuntimeError: no driver" in result.out


def test_tokens_shows_ids_tokens_and_text(call, shakespeare):
    result = call("tokens", "my lord\né")
    ids = shakespeare.tokenizer.encode("my lord\né")
    header, *rows = result.out.splitlines()
    assert header.split() == ["id", "token", "text"]
    assert [int(row.split()[0]) for row in rows] == ids
    assert [row.split()[1] for row in rows] == [shakespeare.tokenizer.decoder[id] for id in ids]
    assert '" lord"' in result.out
    assert '"\\n"' in result.out
    assert "<c3>" in result.out
    assert call("tokens", stdin="my lord\né\n".encode()).out == result.out


def test_tokens_as_json(call):
    record = json.loads(call("tokens", "--json", " é").out)
    assert record["model"] == "shakespeare"
    assert [token["bytes"] for token in record["tokens"]] == ["20", "c3", "a9"]
    assert [token["text"] for token in record["tokens"]] == [" ", None, None]
    assert record["tokens"][0]["token"] == "Ġ"


def test_tokens_of_another_model(call):
    assert "there is no directory 'x'" in call("tokens", "a", "-m", "x").err


# Help, version, completion


def test_help_shows_the_options_of_generation_and_the_commands(call):
    result = call("--help")
    assert result.code == 0
    assert result.out.startswith("Usage: gpt-xp [OPTIONS] [PROMPT]\n")
    for part in ("--temperature X", "--prompt-file FILE", "GPT_XP_MAX_TOKENS", "\nCommands:\n", "\n  tokens "):
        assert part in result.out
    assert "--temperature X" in call("generate", "--help").out
    assert call("--version").out == f"gpt-xp {gpt_xp.__version__}\n"


def test_help_loads_no_array_library():
    code = """
import sys
from gpt_xp.cli import main
try:
    main()
except SystemExit:
    print(sorted({"jax", "cupy", "tensorflow", "torch"} & sys.modules.keys()))
"""
    result = process("--help", command=[sys.executable, "-c", code])
    assert result.out.endswith("\n[]\n")


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="gpt-xp")
    assert script.load() is main


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("gpt-xp --temp", {"--temperature"}),
        ("gpt-xp ba", {"backends"}),
        ("gpt-xp -n 5 --st", {"--stop", "--stats", "--strict"}),
        ("gpt-xp tokens --js", {"--json"}),
        ("gpt-xp A --dtype b", {"bfloat16"}),
    ],
)
def test_shell_completion(line, completions):
    from click.shell_completion import BashComplete

    *words, incomplete = line.split()[1:]
    items = BashComplete(cli, {}, "gpt-xp", "_GPT_XP_COMPLETE").get_completions(words, incomplete)
    assert sorted(item.value for item in items) == sorted(completions)


def test_shell_completion_has_a_script():
    result = process(command=COMMAND, env={**os.environ, "_GPT_XP_COMPLETE": "zsh_source"})
    assert "#compdef gpt-xp" in result.out


# Terminals, pipes and signals


@posix
def test_without_a_prompt_a_terminal_gets_the_help():
    for args, usage in (((), "gpt-xp [OPTIONS] [PROMPT]"), (("tokens",), "gpt-xp tokens [OPTIONS] [TEXT]")):
        terminal = Terminal(*args)
        assert terminal.end() == 0
        assert terminal.seen.startswith(f"Usage: {usage}")


@posix
def test_a_terminal_is_told_of_the_bundled_model_and_gets_the_same_text(shakespeare):
    told = "gpt-xp: using the bundled model shakespeare; `gpt-xp models pull 124M` gets GPT-2\n"
    text = continuation(shakespeare, "My lord", max_tokens=9) + "\n"
    for args, expected in (([], told + text), (["--no-stream", "-m", "shakespeare"], text)):
        terminal = Terminal("My lord", "-n", "9", *args)
        assert terminal.end() == 0
        assert terminal.seen == expected


@posix
def test_a_terminal_gets_the_text_as_it_comes_and_ctrl_c_keeps_it(shakespeare):
    terminal = Terminal("A", "-m", "shakespeare", *LONG, command=SLOW_COMMAND)
    terminal.read(until=" ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    whole = continuation(shakespeare, "A", max_tokens=250, ignore_eos=True)
    text = terminal.seen.removesuffix("\n\n")  # one of ours, one of click's
    assert len(text) > 1
    assert whole.startswith(text)
    assert text != whole


@posix
@pytest.mark.parametrize("samples", ["1", "2"])
def test_ctrl_c_keeps_the_text_that_a_pipe_has_not_seen_yet(shakespeare, samples):
    args = ("A", "--temperature", "1", "--seed", "5", "--num-samples", samples, *LONG)
    running = start(*args, command=SLOW_COMMAND)
    assert running.stderr is not None
    for _ in range(8):
        assert running.stderr.readline() == b"a token\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert b"Traceback" not in err
    whole = shakespeare.generate("A", temperature=1.0, seed=5, num_samples=2, max_tokens=250, ignore_eos=True)
    if samples == "1":
        assert len(out) > 5
        assert whole[0].text.startswith(out.decode().removesuffix("\n"))
    else:
        first, second = out.decode().removeprefix("--- sample 1 ---\n").split("\n--- sample 2 ---\n")
        assert whole[0].text.startswith(first)
        assert whole[1].text.startswith(second.removesuffix("\n"))


@posix
@pytest.mark.parametrize("wait", [0.02, 0.1, 0.3, 0.6])
def test_ctrl_c_while_jax_is_imported(wait):
    pytest.importorskip("jax")
    terminal = Terminal("A", "-b", "jax", *LONG, command=SLOW_COMMAND)
    terminal.read(until="bundled model")
    time.sleep(wait)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


# Modules that get a Ctrl-C while they are imported. The last one swallows it, as C code does that sees an error.
INTERRUPTED = {
    "raised": "import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass",
    "swallowed": """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    while True: pass
except KeyboardInterrupt:
    raise ImportError("numpy cannot be imported") from None
""",
}


@posix
@pytest.mark.parametrize(
    ("module", "how"), [("numpy", "raised"), ("numpy", "swallowed"), ("click", "raised"), ("threading", "raised")]
)
def test_ctrl_c_while_something_is_imported(tmp_path, module, how):
    (tmp_path / f"{module}.py").write_text(INTERRUPTED[how])
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gpt_xp.cli import main; main()"
    result = process(str(tmp_path), "A", command=[sys.executable, "-c", code])
    assert (result.code, result.out) == (130, "")
    assert result.err.strip() == ""


@posix
def test_ctrl_c_when_all_is_done(tmp_path):
    code = """
import atexit, os, signal
from gpt_xp.cli import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
main()
"""
    result = process("A", "-n", "1", command=[sys.executable, "-c", code])
    assert (result.code, result.err.strip()) == (130, "")


@posix
def test_behind_nohup_ctrl_c_stays_ignored(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    code = """
import os, signal, sys
from gpt_xp.cli import run
assert run() == 0
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    result = process(
        "A", "-n", "1", command=[sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert result.code == 0, result.err


@posix
def test_ctrl_c_in_a_callback_is_not_lost():
    code = """
import sys, time
from gpt_xp.cli.interrupts import resend_interrupt
sys.unraisablehook = resend_interrupt
class Callback:
    def __del__(self):
        raise KeyboardInterrupt
Callback()
try:
    for _ in range(200):
        time.sleep(0.1)
except KeyboardInterrupt:
    print("interrupted")
"""
    result = process(command=[sys.executable, "-c", code])
    assert result == (0, "interrupted\n", "")


@posix
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    prompts = _write(tmp_path / "prompts.txt", "a\nb\nc\n")
    for args in (("A",), ("--prompt-file", str(prompts), "--batch-size", "1"), ("backends",), ("tokens", "a")):
        running = start(*args)
        assert running.stdout is not None
        running.stdout.close()
        running.stdout = None
        _, err = running.communicate(timeout=PATIENCE)
        assert (running.returncode, err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("args", [("A",), ("A", "--json"), ("--help",)])
def test_a_full_disk_is_one_line(args):
    with open("/dev/full", "wb") as full:
        running = start(*args, stdout=full)
        _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert b"gpt-xp: error: cannot write to stdout: No space left on device" in err
    assert err.count(b"\n") == 1


def test_characters_that_stdout_lacks_become_question_marks():
    result = process("é ", "--echo", "-n", "1", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.code == 0
    assert result.out.startswith("? ")


@posix
def test_a_bar_shows_on_a_terminal_what_takes_more_than_a_second(tmp_path):
    with open(tmp_path / "out", "w+b") as out:
        terminal = Terminal("A", "-n", "70", "-m", "shakespeare", "--ignore-eos", command=SLOW_COMMAND, stdout=out)
        assert terminal.end() == 0
        assert "/70 [" in terminal.seen
        assert "token/s" in terminal.seen
        out.seek(0)
        assert b"token/s" not in out.read()


def test_waiting_is_shown_after_a_while(monkeypatch: pytest.MonkeyPatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for delay, is_shown in ((0.01, True), (60, False)):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with waiting("loading 124M", delay=delay):
            end = time.monotonic() + (PATIENCE if is_shown else 0.2)
            while not screen.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        assert ("loading 124M 00:00" in screen.getvalue()) is is_shown
