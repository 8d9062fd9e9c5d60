"""`--prompt-file`: a line of JSON for each prompt, in order; an error in the place of one that cannot be continued."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Result

import gpt_xp
from gpt_xp.errors import DeviceMemoryError, NumericalError

pytestmark = pytest.mark.usefixtures("no_variables")
Call = Callable[..., Result]
TOO_LONG = "x " * 300
NO_OBJECT = 'expected a JSON object with a text "prompt", not '


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode(errors="surrogateescape"))
    return str(path)


def no_json(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def records(out: str, *types: str) -> list[dict[str, Any]]:
    """The lines of these types, of all that are there."""
    found = [json.loads(line, parse_constant=no_json) for line in out.splitlines()]
    assert {record["schema"] for record in found} <= {2}
    return [record for record in found if not types or record["type"] in types]


def places(out: str) -> list[tuple[int, str]]:
    """Line and type of each result and each error."""
    return [(record["line"], record["type"]) for record in records(out, "result", "error")]


# What is printed


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_results_come_in_order(call: Call, shakespeare: gpt_xp.Model, tmp_path: Path, batch_size: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfROMEO:\r\n\n  \nMy lord, what say\ryou\n\xe2\x80\xa8{}")
    result = call("--prompt-file", str(file), "-n", "5", "--batch-size", batch_size, "--stats")
    found = records(result.out, "result")
    assert [record["line"] for record in found] == [1, 4, 5]
    assert [record["prompt"] for record in found] == ["ROMEO:", "My lord, what say\ryou", "\u2028{}"]
    for record in found:
        assert record["text"] == shakespeare.generate(record["prompt"], max_tokens=5).text
        assert record["file"] == str(file)
    assert result.err.count("\n") == 1
    assert "; generated 15 tokens" in result.err
    assert result.code == 0


def test_settings_come_once_and_statistics_once_a_batch(call: Call, shakespeare: gpt_xp.Model, tmp_path: Path) -> None:
    file = write(tmp_path / "p", "a\nROMEO:\nc")
    args = ("--prompt-file", file, "-n", "3", "--num-samples", "2", "--temperature", "1", "--seed", "5")
    out = call(*args, "--batch-size", "2").out
    assert [record["type"] for record in records(out)] == [
        "settings",
        *["result"] * 4,
        "batch",
        *["result"] * 2,
        "batch",
    ]
    [settings] = records(out, "settings")
    assert (settings["model"], settings["backend"], settings["seed"]) == ("shakespeare", "numpy", 5)
    assert settings["settings"]["max_tokens"] == 3
    results = records(out, "result")
    assert set(results[0]) == {
        "schema", "type", "file", "line", "prompt", "sample", "text", "token_ids", "finish_reason",
    }  # fmt: skip
    assert [(record["line"], record["sample"]) for record in results] == [(n, s) for n in (1, 2, 3) for s in (0, 1)]
    batches = records(out, "batch")
    assert [batch["rows"] for batch in batches] == [4, 2]
    n_tokens = [len(shakespeare.tokenizer.encode(record["prompt"])) for record in results]
    assert [batch["prompt_tokens"] for batch in batches] == [sum(n_tokens[:4]), sum(n_tokens[4:])]
    assert batches[0]["generated_tokens"] == sum(len(record["token_ids"]) for record in results[:4])
    assert batches[0]["decode_tokens_per_second"] > 0
    assert not set(batches[0]) & set(settings) - {"schema", "type"}


def test_each_line_may_have_everything(call: Call, tmp_path: Path) -> None:
    file = write(tmp_path / "p", "a\nROMEO:\nc")
    args = ("--prompt-file", file, "-n", "3", "--batch-size", "2", "--logprobs")
    brief = call(*args).out
    full = records(call(*args, "--json-full").out)
    assert [record["type"] for record in full] == ["result"] * 3
    assert [record["batch"]["rows"] for record in full] == [2, 2, 1]
    [settings] = records(brief, "settings")
    for record, short in zip(full, records(brief, "result"), strict=True):
        assert {name: value for name, value in record.items() if name != "batch"} == {**settings, **short}
    one, alone = records(call("a", "-n", "3", "--logprobs", "--json-full").out)[0], full[0]
    assert set(alone) - set(one) == {"file", "line"}
    assert one["text"] == alone["text"]


# Lines of JSON


def test_lines_may_be_json(call: Call, tmp_path: Path) -> None:
    lines = '{"prompt": "a\\nb"}\n\n {"prompt": ""} \n'
    for result in (
        call("--prompt-file", "-", "-n", "2", "--num-samples", "2", stdin=lines.encode()),
        call("--prompt-file", write(tmp_path / "x.jsonl", lines), "-n", "2", "--num-samples", "2"),
    ):
        assert [(r["line"], r["prompt"], r["sample"], r["input"]) for r in records(result.out, "result")] == [
            (1, "a\nb", 0, {}), (1, "a\nb", 1, {}), (3, "", 0, {}), (3, "", 1, {}),
        ]  # fmt: skip


def test_other_fields_are_given_back(call: Call, tmp_path: Path) -> None:
    fields = [
        {"id": 7, "tags": ["a", {"b": None}], "é": "\ud800", "n": 12345678901234567890123, "text": "kept apart"},
        {"line": 99, "file": "mine", "error": "mine", "input": {"input": True}},
    ]
    prompts = [json.dumps({"prompt": "a", **fields[0]}), json.dumps({**fields[1], "prompt": TOO_LONG})]
    out = call("--prompt-file", write(tmp_path / "p", "\n".join(prompts)), "-n", "2").out
    assert [record["input"] for record in records(out, "result", "error")] == fields
    assert places(out) == [(1, "result"), (2, "error")]


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "max-tokens", "stop", "model", "n_tokens_to_generate"])
def test_a_field_that_is_an_option_is_an_error_until_it_works(call: Call, tmp_path: Path, field: str) -> None:
    file = write(tmp_path / "p", json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", field: 1}))
    result = call("--prompt-file", file, "-m", "no-such-model")
    assert result == (
        1, "",
        f'gpt-xp: error: {file}, line 2: "{field}" is the name of an option, and a line cannot set it: give the option '
        "to the command, or rename the field\n",
    )  # fmt: skip


def test_what_only_looks_like_json_is_a_prompt(call: Call, tmp_path: Path) -> None:
    lines = ["[", "[" * 101, '{"name": "', "9" * 4400, "[Exit]", "[1]", '"a"', "{{}}"]
    for turn in range(3):  # another line is the first
        turned = lines[turn:] + lines[:turn]
        out = call("--prompt-file", write(tmp_path / "p", "\n".join(turned)), "-n", "1").out
        found = records(out, "result", "error")
        assert [record["prompt"] for record in found] == turned
        assert [record["prompt"] for record in found if record["type"] == "error"] == ["9" * 4400]  # it is too long
        assert not any("input" in record for record in found)


@pytest.mark.parametrize(
    "text",
    [
        '["ROMEO:", "JULIET:"]',
        '[{"prompt": "a"}]\n',
        '\n[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n',
        '{\n  "prompt": "a"\n}\n{\n  "prompt": "b"\n}\n',
        '{"prompt":\n"a"}\n',
        '\ufeff[{"prompt": "a"}]',
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl"])
def test_json_that_is_not_in_lines_is_no_prompt(call: Call, tmp_path: Path, text: str, name: str) -> None:
    file = write(tmp_path / name, text)
    result = call("--prompt-file", file, "-m", "no-such-model")
    message = f'{file} holds JSON that is not in lines: expected an object with a text "prompt" on each line, '
    assert result == (1, "", f"gpt-xp: error: {message}as `jq -c` writes them\n")


# A prompt that cannot be continued

BAD = [
    ("p.txt", TOO_LONG, "the prompt has 600 tokens, and the context of this model holds 256: shorten it by 344"),
    ("p.txt", "a\udcff", "the line is not UTF-8 text: invalid start byte at byte 1"),
    ("p.jsonl", "ok", "the line is not valid JSON (Expecting value: line 1 column 1 (char 0)): ok"),
    ("p.jsonl", '["prompt"]', f'{NO_OBJECT}["prompt"]'),
    ("p.jsonl", '{"prompt": 1}', f'{NO_OBJECT}{{"prompt": 1}}'),
    ("p.jsonl", '{"text": "a"}', f'{NO_OBJECT}{{"text": "a"}}'),
    ("p.jsonl", '{"prompt": "\\ud800"}', "character 0 of the text is the lone surrogate U+D800, which has no UTF-8"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "the name 'prompt' is there 2 times"),
    ("p.jsonl", '{"prompt": "a", "x": NaN}', "JSON has no NaN"),
    ("p.jsonl", '{"prompt": "a", "x": [1e999]}', "JSON has no NaN"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "9" * 4400 + "}", "an integer has too many digits"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 101 + "]" * 101 + "}", "in each other more than 100 times"),
    ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 5000 + "]" * 5000 + "}", "in each other more than 100 times"),
]


@pytest.mark.parametrize(("name", "bad", "message"), BAD)
@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_an_error_stands_in_its_place(
    call: Call, shakespeare: gpt_xp.Model, tmp_path: Path, name: str, bad: str, message: str, batch_size: str
) -> None:
    good = '{"prompt": "My lord"}' if name == "p.jsonl" else "My lord"
    file = write(tmp_path / name, "\n".join([good, bad, good, "", good]))
    result = call("--prompt-file", file, "-n", "3", "--batch-size", batch_size, "--stats")
    assert result.code == 1
    assert places(result.out) == [(1, "result"), (2, "error"), (3, "result"), (5, "result")]
    [error] = records(result.out, "error")
    assert message in error["error"]
    assert error["file"] == file
    if "NaN" in message:  # what JSON can hold is given back
        assert (error["prompt"], error["input"]) in (("a", {"x": None}), ("a", {"x": [None]}))
    text = shakespeare.generate("My lord", max_tokens=3).text
    assert [record["text"] for record in records(result.out, "result")] == [text] * 3
    *_, last = result.err.splitlines()
    assert last == "gpt-xp: 1 of 4 prompts could not be continued: each has an `error` in its place"


@pytest.mark.parametrize(("name", "bad", "message"), BAD)
def test_strict_refuses_all_before_any_work(call: Call, tmp_path: Path, name: str, bad: str, message: str) -> None:
    good = '{"prompt": "My lord"}' if name == "p.jsonl" else "My lord"
    file = write(tmp_path / name, "\n".join([good, "", bad]))
    result = call("--prompt-file", file, "--batch-size", "1", "--strict")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"gpt-xp: error: {file}, line 3: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_strict_lets_good_files_pass(call: Call, tmp_path: Path) -> None:
    args = ("--prompt-file", write(tmp_path / "p", "a\nb"), "-n", "2")
    assert places(call(*args, "--strict").out) == places(call(*args).out)


def test_a_line_may_be_all_that_is_wrong(call: Call, tmp_path: Path) -> None:
    result = call("--prompt-file", write(tmp_path / "p", TOO_LONG), "--stats")
    assert result.code == 1
    assert [record["type"] for record in records(result.out)] == ["settings", "error"]
    assert result.err == "gpt-xp: 1 of 1 prompts could not be continued: each has an `error` in its place\n"


@pytest.mark.parametrize("error", [NumericalError, DeviceMemoryError])
def test_a_prompt_at_which_the_model_fails_is_alone_to_fail(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    generate = gpt_xp.Model.generate

    def fail(model: gpt_xp.Model, prompts: list[str], *settings: Any) -> Any:
        if "bad" in prompts:
            raise error("no numbers")
        return generate(model, prompts, *settings)

    monkeypatch.setattr(gpt_xp.Model, "generate", fail)
    file = write(tmp_path / "p", "a\nb\nbad\nd\ne")
    result = call("--prompt-file", file, "-n", "2", "--batch-size", "5")
    assert result.code == 1
    assert places(result.out) == [(n, "error" if n == 3 else "result") for n in range(1, 6)]
    assert [record["error"] for record in records(result.out, "error")] == ["no numbers"]
    assert sum(batch["rows"] for batch in records(result.out, "batch")) == 4
    strict = call("--prompt-file", file, "-n", "2", "--strict")
    assert (strict.code, strict.err) == (1, "gpt-xp: error: no numbers\n")
    assert records(strict.out, "result", "error") == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('plain\n{"prompt": "a"}\n', ", line 2 is a JSON object, and the first line is not: make all of them objects"),
        ('plain\n{"prompt": "a", "x": ' + "9" * 4400 + "}", ", line 2 is a JSON object, and the first line is not"),
        ("\n \n", " holds no prompt: expected one a line"),
        ("\ufeff", " holds no prompt: expected one a line"),
    ],
)
def test_a_file_that_is_no_prompt_file_is_refused(call: Call, tmp_path: Path, lines: str, message: str) -> None:
    file = write(tmp_path / "p", lines)
    result = call("--prompt-file", file, "-m", "no-such-model")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"gpt-xp: error: {file}{message}")
    assert result.err.count("\n") == 1


# Several files


def test_several_files_are_continued_together(call: Call, tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "a\n" + TOO_LONG)
    second = write(tmp_path / "b.jsonl", '\n{"prompt": "c", "id": 1}')
    args = ("-n", "2", "--batch-size", "8")
    out = call("--prompt-file", first, "--prompt-file", "-", "--prompt-file", second, *args, stdin=b"b\n").out
    assert [(record["file"], record["line"], record["type"]) for record in records(out, "result", "error")] == [
        (first, 1, "result"), (first, 2, "error"), ("-", 1, "result"), (second, 2, "result"),
    ]  # fmt: skip
    assert [batch["rows"] for batch in records(out, "batch")] == [3]
    assert len(records(out, "settings")) == 1


def test_a_variable_may_name_several_files(call: Call, tmp_path: Path) -> None:
    files = [write(tmp_path / name, "a") for name in ("1", "2")]
    out = call("-n", "1", GPT_XP_PROMPT_FILE=os.pathsep.join(files)).out
    assert [record["file"] for record in records(out, "result")] == files


def test_a_prompt_file_is_instead_of_a_prompt(call: Call, tmp_path: Path) -> None:
    files = [write(tmp_path / name, "a") for name in ("1", "2")]
    result = call("--prompt-file", *files)  # as a shell writes *.txt
    assert result.code == 2
    assert "not both; several files each need a --prompt-file" in result.err
    assert call("--prompt-file", str(tmp_path / "missing")).code == 2
    assert call("--prompt-file", str(tmp_path)).code == 2


def test_help_tells_of_errors_and_files(call: Call) -> None:
    shown = " ".join(call("--help").out.split())
    for part in ("has an `error`, and the exit code is 1", "May be given several times", "--strict", "--json-full"):
        assert part in shown
