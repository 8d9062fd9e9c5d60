"""`--special-tokens`: in each command, text that spells a special token is plain text, or that token."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("no_variables")

TEXT = "ROMEO:<|endoftext|>JULIET:"
TOLD = "gpt-xp: <|endoftext|> in the text is read as plain text; --special-tokens reads it as one token\n"
ON = ("--special-tokens",)


@pytest.fixture
def ids(shakespeare):
    """The token ids of the text without and with the option."""
    return {allowed: shakespeare.tokenizer.encode(TEXT, special_tokens=allowed) for allowed in (False, True)}


def both(call, *arguments, stdin=b""):
    """Run a command without and with the option; only the first says what it does."""
    plain, special = call(*arguments, stdin=stdin), call(*arguments, *ON, stdin=stdin)
    assert (plain.code, special.code) == (0, 0)
    assert (TOLD in plain.err, TOLD in special.err) == (True, False)
    assert plain.err.count("plain text") == 1
    return {False: plain.out, True: special.out}


def test_generate(call, shakespeare, ids):
    for allowed, out in both(call, TEXT, "-n", "5", "--json").items():
        record = json.loads(out)
        assert record["batch"]["prompt_tokens"] == len(ids[allowed])
        assert record["token_ids"] == shakespeare.generate(ids[allowed], max_tokens=5).token_ids
        assert record["settings"]["special_tokens"] is allowed


def test_prompt_file(call, shakespeare, ids, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"A\n{TEXT}\n{TEXT}\n")
    for allowed, out in both(call, "--prompt-file", str(tmp_path / "prompts.txt"), "-n", "5").items():
        found = [record for record in map(json.loads, out.splitlines()) if record["type"] == "result"]
        assert found[1]["token_ids"] == found[2]["token_ids"]
        assert found[1]["token_ids"] == shakespeare.generate(ids[allowed], max_tokens=5).token_ids


def test_tokens(call, ids):
    for allowed, out in both(call, "tokens", TEXT, "--json").items():
        assert [token["id"] for token in json.loads(out)["tokens"]] == ids[allowed]


def test_score(call, shakespeare, ids):
    for allowed, out in both(call, "score", "-", "--json", stdin=TEXT.encode()).items():
        record = json.loads(out)
        assert [token["id"] for token in record["per_token"]] == ids[allowed]
        assert record["perplexity"] == pytest.approx(shakespeare.score(ids[allowed]).perplexity)


def test_score_choices(call, shakespeare, ids):
    choice = shakespeare.tokenizer.encode(" a")
    for allowed, out in both(call, "score", "--choices", TEXT, " a", "--json").items():
        expected = shakespeare.rank(ids[allowed], [choice])[0].logprob
        assert json.loads(out)["choices"][0]["logprob"] == pytest.approx(expected)


def test_nothing_is_said_of_a_text_that_spells_none(call):
    assert call("tokens", "a <|endoftext| b").err == ""
