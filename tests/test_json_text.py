"""JSON that Python's parser refuses, by whatever exception, is one error wherever JSON is read."""

import codecs
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Result
from folders import SHAKESPEARE
from hypothesis import given
from hypothesis import strategies as st

import gpt_xp
from gpt_xp import json_text
from gpt_xp.benchmark.process import ContenderProcess
from gpt_xp.errors import CheckpointError, GptXpError, JsonError, JsonLimitError

pytestmark = pytest.mark.usefixtures("no_variables")
DEEP, NOT_JSON = "in each other more than 100 times", "Expecting"
# Values that are refused, with a part of the message. Python's own parser takes the fourth, but cannot write it again.
ODD = {
    "a number of 4400 digits": ("9" * 4400, "an integer has too many digits"),
    "a thousand brackets": ("[" * 1000 + "]" * 1000, DEEP),
    "brackets without end": ("[" * 100_000, DEEP),
    "980 brackets": ("[" * 980 + "]" * 980, DEEP),
    "101 objects": ('{"a":' * 101 + "1" + "}" * 101, DEEP),
    "no JSON": ("[1,,2]", NOT_JSON),
}
odd = pytest.mark.parametrize(("value", "message"), ODD.values(), ids=ODD)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=20,
    )
)
def test_what_is_json_is_read(value: Any) -> None:
    text = json.dumps(value)
    assert json_text.parse(text) == json_text.parse(text.encode()) == value
    assert json_text.parse(codecs.BOM_UTF8 + text.encode()) == value
    assert json_text.parse(text, unique=True) == value


@odd
@pytest.mark.parametrize("form", ["{}", '{{"a": {}}}', "[1, {}]"])
def test_what_is_not_read_is_a_json_error(value: str, message: str, form: str) -> None:
    for text in (form.format(value), form.format(value).encode()):
        with pytest.raises(JsonError, match=message) as caught:
            json_text.parse(text)
        assert isinstance(caught.value, JsonLimitError) == (message != NOT_JSON)


def test_brackets_in_texts_and_side_by_side_are_not_deep() -> None:
    wide = json.dumps({"merges": [["a", "b"]] * 1000, "text": "[" * 1000})
    assert len(json_text.parse(wide)["merges"]) == 1000
    assert len(json_text.parse("[" * 100 + "]" * 99 + ", [1]]")) == 2


@pytest.mark.parametrize("text", [b'{"a": "\xff"}', b"", "", "\ufeff1"])
def test_what_is_no_text_is_a_json_error(text: str | bytes) -> None:
    with pytest.raises(JsonError):
        json_text.parse(text)


def test_a_name_that_is_there_twice() -> None:
    assert json_text.parse('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(JsonError, match="'a' is there 2 times"):
        json_text.parse('[{"b": {"a": 1, "a": 2}}]', unique=True)


# Where JSON is read


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model, with a second form of tokenizer beside it where a test writes one."""
    return Path(shutil.copytree(SHAKESPEARE, tmp_path / "model"))


@odd
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "vocab.json",
        "added_tokens.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ],
)
def test_files_of_a_model(model: Path, name: str, value: str, message: str) -> None:
    for content in (value, f'{{"model_type": {value}}}', f'{{"n_embd": {value}, "normalizer": {value}}}'):
        (model / name).write_text(content)
        with pytest.raises(GptXpError, match=name) as caught:
            gpt_xp.load(model)
        assert message in str(caught.value)


def test_an_id_of_4400_digits_that_is_a_name(model: Path) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9" * 4400: {"content": "x"}}}))
    with pytest.raises(GptXpError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        gpt_xp.load(model)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
def test_a_byte_order_mark_in_a_file_of_a_model(model: Path, name: str, shakespeare: gpt_xp.Model) -> None:
    (model / name).write_bytes(codecs.BOM_UTF8 + (model / name).read_bytes())
    found = gpt_xp.load(model, backend="numpy")
    assert found.config == shakespeare.config
    assert found.tokenizer.encoder == shakespeare.tokenizer.encoder
    assert found.tokenizer.merges == shakespeare.tokenizer.merges


@odd
def test_the_variable_of_stop(call: Callable[..., Result], value: str, message: str) -> None:
    for text in (value, f'["END", {value}]'):
        result = call("A", GPT_XP_STOP=text)
        assert (result.code, result.out) == (2, "")
        assert "GPT_XP_STOP must be a JSON list of strings" in result.err


@odd
def test_the_log_of_a_run(tmp_path: Path, value: str, message: str) -> None:
    log = pytest.importorskip("gpt_xp.training.log")
    good = log.Evaluation(0, None, 5.0, 2.0, 0.1, 0, 0.1, True)
    log.write_log(tmp_path / "train.jsonl", [good])
    assert log.read_log(tmp_path / "train.jsonl", 0) == [good]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(value + "\n")
    with pytest.raises(CheckpointError, match=r"train\.jsonl, line 2 is no evaluation .*--resume") as caught:
        log.read_log(tmp_path / "train.jsonl", 0)
    assert message in str(caught.value)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"train\.jsonl cannot be read \(No such file or directory\)"):
        log.read_log(tmp_path / "train.jsonl", 0)


@pytest.mark.parametrize("counts", ['{"train_tokens": 5}', "[]", '{"a": ' + "9" * 4400 + "}"])
def test_the_counts_of_a_corpus(tmp_path: Path, counts: str, shakespeare: gpt_xp.Model) -> None:
    corpus = pytest.importorskip("gpt_xp.training.corpus")
    (tmp_path / "corpus.json").write_text(counts)
    with pytest.raises(CheckpointError, match=r"corpus\.json"):
        corpus.open_corpus(tmp_path, shakespeare.tokenizer, 3)


@odd
def test_jobs_of_other_processes(call: Callable[..., Result], tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "job.json").write_text(value)
    result = call("compare-backend", str(tmp_path / "job.json"))
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@odd
def test_what_a_contender_writes_before_it_serves(value: str, message: str) -> None:
    script = f"print({value!r}); print('{{\"ok\": 1}}', flush=True); input()"
    with ContenderProcess([sys.executable, "-c", script], {}) as worker:
        assert worker.ask("describe") == {"ok": 1}
