"""`gpt-xp score`: what it prints is what the library computes, and a wrong call is one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Result

from gpt_xp import Model
from gpt_xp.scoring import score as scoring

TEXT = "ROMEO:\nBut soft, what light\nthrough yonder window breaks?\n\nJULIET:\nÔ Romeo, Romeo!\n" * 3
Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _settings(no_variables: None) -> None:
    pass


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


def figures(out: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in out.splitlines())


def test_the_table_is_the_score(call: Call, file: str, shakespeare: Model) -> None:
    score = shakespeare.score(TEXT)
    code, out, err = call("score", "-m", "shakespeare", file)
    assert (code, err) == (0, "")
    shown = {name: value.strip() for name, value in figures(out).items()}
    assert shown.pop("time").endswith(" tok/s")
    n_ctx = shakespeare.config.n_ctx
    assert shown == {
        "convention": f"huggingface, window {n_ctx}, stride {n_ctx // 2}",
        "tokens": f"{len(score.token_ids)}, {len(score.token_ids) - 1} scored",
        "words": "40",  # 13 in each third, and the empty one after the last newline
        "characters": str(len(TEXT)),
        "bytes": str(len(TEXT.encode())),
        "nats per token": f"{score.nats_per_token:.4f}",
        "nats per character": f"{score.nats_per_character:.4f}",
        "bits per byte": f"{score.bits_per_byte:.4f}",
        "perplexity per token": f"{score.perplexity:.4f}",
        "perplexity per word": f"{score.word_perplexity:.4f}",
    }


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--window", "32", "--stride", "20", "--batch-size", "3"], {"window": 32, "stride": 20}),
        (["--convention", "lm-eval", "--window", "30"], {"convention": "lm-eval", "window": 30}),
        (
            ["--convention", "nanogpt", "--crops", "2", "--window", "30", "--seed", "4"],
            {"convention": "nanogpt", "crops": 2, "window": 30, "seed": 4},
        ),
    ],
)
def test_json_holds_every_token(
    call: Call, file: str, shakespeare: Model, options: list[str], settings: dict[str, Any]
) -> None:
    def no_json(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    record = json.loads(call("score", "-m", "shakespeare", "--json", *options, file).out, parse_constant=no_json)
    score = shakespeare.score(TEXT, **settings)
    for name, value in settings.items():
        assert record[name] == value
    each = record["per_token"]
    assert [token["id"] for token in each] == score.token_ids.tolist()
    np.testing.assert_allclose(
        [math.nan if token["logprob"] is None else token["logprob"] for token in each], score.logprobs, rtol=1e-4
    )
    texts = [token["text"] for token in each]
    assert [text for text in texts if text] == [
        text for text in map(shakespeare.tokenizer.decode, ([token["id"]] for token in each)) if "\ufffd" not in text
    ]
    assert record["scored_tokens"] == score.n_scored
    assert record["tokens"] == len(each)
    for name in ("logprob", "nats_per_token", "nats_per_character", "bits_per_byte", "word_perplexity"):
        assert record[name] == pytest.approx(getattr(score, name), rel=1e-4)
    assert record["byte_perplexity"] == pytest.approx(2 ** record["bits_per_byte"])
    assert (record["schema"], record["model"], record["backend"]) == (2, "shakespeare", "numpy")
    assert (record["file"], record["last"]) == (file, 1.0)


def test_a_text_comes_from_stdin_as_it_is(call: Call) -> None:
    record = json.loads(call("score", "-m", "shakespeare", "--json", "-", stdin=b"My lord \r\n\n").out)
    assert "".join(token["text"] for token in record["per_token"]) == "My lord \r\n\n"


@pytest.mark.parametrize(("last", "kept"), [("0.1", 10), ("0.55", 52), ("1", 94)])
def test_last_is_what_training_leaves_out(call: Call, last: str, kept: int) -> None:
    text = "".join(chr(ord("a") + i % 23) for i in range(94))
    record = json.loads(call("score", "-m", "shakespeare", "--json", "--last", last, "-", stdin=text.encode()).out)
    assert "".join(token["text"] for token in record["per_token"]) == text[-kept:]
    assert record["characters"] == kept
    if last == "0.1":
        assert text[-kept:] == text[int(0.9 * len(text)) :]


def test_another_backend(call: Call, file: str, shakespeare: Model) -> None:
    result = call("score", "-m", "shakespeare", "-b", "array-api-strict", "--dtype", "float64", "--json", file)
    record = json.loads(result.out)
    assert (record["backend"], record["dtype"]) == ("array-api-strict", "float64")
    assert record["logprob"] == pytest.approx(shakespeare.score(TEXT).logprob, rel=1e-5)


def test_choices_are_ranked(call: Call, shakespeare: Model) -> None:
    arguments = ["score", "-m", "shakespeare", "--choices", "My name is ", "Romeo", "qzx", "the moon"]
    for by in ("total", "token", "byte"):
        ranked = shakespeare.rank("My name is ", arguments[5:], by=by)
        lines = call(*arguments, "--by", by).out.splitlines()
        assert lines[0].split() == ["choice", "tokens", "log-probability", "per", "token", "per", "byte"]
        for line, each in zip(lines[1:], ranked, strict=True):
            assert line.startswith(json.dumps(each.choice))
            expected = (each.logprob, each.logprob_per_token, each.logprob_per_byte)
            assert line.split()[-4:] == [str(len(each.token_ids)), *(f"{figure:.4f}" for figure in expected)]
    record = json.loads(call(*arguments, "--json").out)
    ranked = shakespeare.rank("My name is ", arguments[5:])
    assert [each["choice"] for each in record["choices"]] == [each.choice for each in ranked]
    assert [each["index"] for each in record["choices"]] == [each.index for each in ranked]
    best = record["choices"][0]
    assert "".join(token["text"] for token in best["per_token"]) == f" {best['choice']}"
    assert sum(token["logprob"] for token in best["per_token"]) == pytest.approx(best["logprob"])
    assert (record["prompt"], record["by"], record["model"]) == ("My name is ", "total", "shakespeare")


def test_the_prompt_of_choices_may_come_from_stdin(call: Call) -> None:
    piped = call("score", "-m", "shakespeare", "--choices", "-", " a", " b", stdin=b"My lord\n")
    given = call("score", "-m", "shakespeare", "--choices", "My lord", " a", " b")
    assert piped == given
    literal = call("score", "-m", "shakespeare", "--choices", "--json", "--", "-", "-a", stdin=b"My lord")
    assert json.loads(literal.out)["prompt"] == "-"
    assert json.loads(literal.out)["choices"][0]["choice"] == "-a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one FILE, or - for stdin, not 0"),
        (["a", "b"], "give one FILE, or - for stdin, not 2; --choices ranks continuations"),
        (["no-such-file"], "'no-such-file' does not exist"),
        (["--stride", "0", "-"], "0 is not in the range x>=1"),
        (["--last", "0", "-"], "0.0 is not in the range 0<x<=1"),
        (["--convention", "lm-eval", "--stride", "4", "-"], "stride belongs to the convention huggingface"),
        (["--crops", "4", "-"], "crops belongs to the convention nanogpt"),
        (["--by", "token", "-"], "--by goes with --choices"),
        (["--choices", "a"], "needs a PROMPT and at least one CHOICE"),
        (["--choices", "--last", "0.5", "a", "b"], "--last has no meaning with --choices"),
    ],
)
def test_wrong_usage_is_code_2_before_a_model_is_loaded(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call("score", "-m", "no-such-model", *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-"], b"", "the text is empty: there is nothing to score"),
        (["-"], b"a", "the text is one token"),
        (["-"], b"abc\xff", "stdin is not UTF-8 text: invalid start byte at byte 3"),
        (["--window", "100000", "-"], b"abc", "window must be from 2 to"),
        (["--window", "4", "--stride", "5", "-"], b"abc", "stride must be at most the window, 4"),
        (["--choices", "a", ""], b"", "none may be empty"),
        (["--choices", "a " * 3000, "b"], b"", "shorten the prompt by"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_code_1(
    call: Call, arguments: list[str], stdin: bytes, message: str
) -> None:
    code, out, err = call("score", "-m", "shakespeare", *arguments, stdin=stdin)
    assert (code, out) == (1, "")
    assert err.startswith("gpt-xp: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_ctrl_c_is_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "row_logprobs", interrupted)
    code, out, err = call("score", "-m", "shakespeare", "-", stdin=TEXT.encode())
    assert (code, out, err.strip()) == (130, "", "")
