"""The commands `backends` and `tokens`, the help, and the completion of shells."""

import json
import os
import sys
from importlib.metadata import entry_points

import pytest
from commands import COMMAND, process

import gpt_xp
from gpt_xp.cli import main
from gpt_xp.cli.group import cli

pytestmark = pytest.mark.usefixtures("no_variables")


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
        "On a CPU, native is the fastest. Others are compared with numpy.\n"
    )
    record = json.loads(call("backends", "--json").out)
    assert (record["schema"], record["default"]) == (2, "numpy")
    assert record["backends"][1]["devices"][0] == {"name": "cuda:0", "kind": "GPU X", "memory": 80_000_000_000}
    assert record["backends"][0]["fix"] == "pip install it"


def test_backends_shows_what_the_devices_of_a_mesh_hold(call, monkeypatch):
    device = gpt_xp.backend.DeviceInfo("cuda:0", "GPU X", 3_000_000_000)
    monkeypatch.setattr("gpt_xp.cli.backends.find_backends", lambda: [gpt_xp.BackendInfo("jax", "0.10", (device,) * 4)])
    monkeypatch.setattr("gpt_xp.cli.backends.report_on_backends", lambda infos: [])
    shown = call("backends", "--verbose", "--mesh", "data=2,model=2").out
    assert (
        "\nGB of params + cache of one row on each device of the mesh data=2,model=2 (it needs 4 devices, "
        "and jax has 4 here), and whether they fit:\n" in shown
    )
    assert "  124M         0.25 + 0.038 yes\n" in shown
    assert "  1558M        3.16 + 0.327 no\n" in shown
    assert "of the mesh data=4 (it needs 4 devices" in call("backends", "--verbose", "--mesh", "auto").out
    record = json.loads(call("backends", "--verbose", "--json", "--mesh", "model=4").out)
    assert record["mesh"][0] == {
        "model": "124M", "dtype": "float32", "params": 126_971_904, "cache": 18_874_368, "fits": True,
    }  # fmt: skip
    assert "--mesh must be data=N" in call("backends", "--verbose", "--mesh", "4").err
    assert call("backends", GPT_XP_MESH="nonsense").code == 0
    assert call("backends", "--mesh", "data=2").err == "gpt-xp: --mesh has no effect without --verbose\n"


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
