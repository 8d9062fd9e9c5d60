"""Generation on every backend: transformers' greedy text, and batches compared with each of their rows alone."""

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from folders import GOLDEN_FILES
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

import gpt_xp
from gpt_xp import Backend, Generation, GPT2Config, Model, Tokenizer
from gpt_xp.errors import DeviceMemoryError, NumericalError, PromptError, SettingError
from gpt_xp.generation import decoder
from gpt_xp.tokenizer.words import EOS

GOLDEN = json.loads((GOLDEN_FILES / "shakespeare.json").read_text())
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


def small(backend: Backend, name: str = "prime") -> Model:
    return Model(small_params(name), CONFIGS[name], backend=backend)


def same_tokens(actual: Generation, expected: Generation) -> None:
    """Check for equal tokens, up to the first place where the two best choices are almost tied."""
    for ours, theirs, margin in zip(actual.token_ids, expected.token_ids, expected.margins, strict=False):
        if ours != theirs:
            assert margin < 1e-4, "more than a tie"
            return
    assert actual.finish_reason == expected.finish_reason
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-3)


def test_greedy_text_is_that_of_transformers(backend: Backend) -> None:
    model = gpt_xp.load("shakespeare", backend=backend)
    assert model.tokenizer.encode(GOLDEN["prompt"]) == GOLDEN["prompt_ids"]
    out = model.generate(GOLDEN["prompt"], max_tokens=100)
    assert min(out.margins) > 1e-4  # There is no tie, so every backend must choose these tokens.
    assert out.token_ids == GOLDEN["token_ids"]
    assert out.text == GOLDEN["text"]
    assert out.finish_reason == "max_tokens"


def test_all_logits(backend: Backend) -> None:
    for name in ("prime", "long"):  # in one chunk, and in three
        tokens = small_tokens(name)
        expected = gpt_xp.gpt2(small_params(name), tokens, CONFIGS[name])
        model = small(backend, name)
        assert_values(model.logits(tokens), expected, TOLERANCE["logits", "float32"])
        assert_values(model.logits(tokens[0].tolist()), expected[0], TOLERANCE["logits", "float32"])
        assert model.logits(tokens).dtype == np.float32


def test_sampled_tokens_are_those_of_numpy(backend: Backend) -> None:
    for name in ("prime", "long"):
        prompt = small_tokens(name)[0, :17].tolist()
        ours = small(backend, name).generate(prompt, **SAMPLED)
        same_tokens(ours, small(make_backend("numpy"), name).generate(prompt, **SAMPLED))


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_each_row_of_a_batch_is_that_prompt_alone(backend: Backend, options: dict[str, Any]) -> None:
    model, tokens = small(backend), small_tokens("prime")[0].tolist()
    prompts = [tokens[:3], tokens[:29], tokens[:1], tokens[:11]]
    batch = model.generate(prompts, max_tokens=30, **options)
    assert [out.finish_reason for out in batch] == ["max_tokens", "context", "max_tokens", "context"]
    assert [len(out.token_ids) for out in batch] == [30, 37 - 29 + 1, 30, 37 - 11 + 1]
    for prompt, row in zip(prompts, batch, strict=True):
        same_tokens(row, model.generate(prompt, max_tokens=30, **options))


def test_a_prompt_may_fill_the_context(backend: Backend) -> None:
    model = small(backend)
    prompt = (small_tokens("prime")[0].tolist() * 2)[:37]
    out = model.generate(prompt, max_tokens=None)
    assert (len(out.token_ids), out.finish_reason) == (1, "context")
    assert out.token_ids[0] == model.logits(prompt)[-1].argmax()
    with pytest.raises(PromptError, match=r"the prompt has 38 tokens, and the context of this model holds 37"):
        model.generate([*prompt, 1])


def test_samples_differ_and_can_be_had_one_by_one() -> None:
    model = small(make_backend("numpy"))
    samples = model.generate([5, 6, 7], num_samples=3, **SAMPLED)
    assert len({tuple(out.token_ids) for out in samples}) == 3
    assert samples[0].token_ids == model.generate([5, 6, 7], **SAMPLED).token_ids
    two = model.generate([[5, 6, 7], [8]], num_samples=3, **SAMPLED)
    assert [out.token_ids for out in two[:3]] == [out.token_ids for out in samples]
    assert two[3].token_ids == model.generate([8], **SAMPLED).token_ids


def test_another_seed_is_another_text_and_no_seed_draws_one() -> None:
    model = small(make_backend("numpy"))
    texts = {tuple(model.generate([5], temperature=1.0, seed=seed, max_tokens=20).token_ids) for seed in (1, 2, None)}
    assert len(texts) == 3


def test_each_prompt_may_have_its_own_seed(backend: Backend) -> None:
    model, prompts, seeds = small(backend), [[5, 6, 7], [8], [5, 6, 7]], [3, 2**64 - 1, 4]
    for options in (SAMPLED, SAMPLED | {"top_k": None, "num_samples": 2}):
        together = model.generate(prompts, **options | {"seed": seeds})
        alone = [model.generate([ids], **options | {"seed": seed}) for ids, seed in zip(prompts, seeds, strict=True)]
        for actual, expected in zip(together, [result for results in alone for result in results], strict=True):
            same_tokens(actual, expected)
        assert together[0].token_ids != together[-1].token_ids  # One prompt, two seeds.
    assert (
        model.generate([5], **SAMPLED | {"seed": [3]}).token_ids
        == model.generate([5], **SAMPLED | {"seed": 3}).token_ids
    )


@pytest.mark.parametrize(
    "seed", [[1, 2], [], [1, -1, 2], [1, 2**64, 3], [1, None, 2], [1, 2.5, 3], [True, 1, 2], "123"]
)
def test_seeds_that_do_not_fit_are_refused(seed: Any) -> None:
    with pytest.raises(SettingError, match=r"^seed (is a list of \d, and there are 3 prompts|must )"):
        small(make_backend("numpy")).generate([[1], [2], [3]], temperature=1.0, seed=seed)


def test_repetition_penalty_counts_prompt_and_continuation() -> None:
    model, ids = small(make_backend("numpy")), [5, 6, 7]
    out = model.generate(ids, max_tokens=20, repetition_penalty=1.7)
    for token in out.token_ids:
        logits = model.logits(ids)[-1]
        seen = sorted(set(ids))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        assert token == logits.argmax()
        ids.append(token)
    assert out.token_ids != model.generate([5, 6, 7], max_tokens=20).token_ids


# JAX compiles few programs.


def test_jax_compiles_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(n_vocab=31, n_ctx=1024, n_embd=14, n_head=2, n_layer=1)
    params = plain_params(config)
    traced: list[tuple[tuple[int, ...], int]] = []
    original = decoder.next_token_logits

    def spy(params: Any, tokens: Any, cache: Any, count: Any, config: Any, xp: Any) -> Any:
        traced.append((tokens.shape, cache.n_slots))
        return original(params, tokens, cache, count, config, xp)

    monkeypatch.setattr(decoder, "next_token_logits", spy)
    model = Model(params, config, backend=make_backend("jax"))
    sizes = 2 + int(math.log2(config.n_ctx / 128))  # 128, 256, 512, 768, 1024

    def everything(rows: int) -> None:
        for n_prompt, n_new in ((1, 5), (16, 1), (17, 300), (130, 2), (500, 100), (1024, None), (700, 400)):
            prompts = [[3] * max(1, n_prompt // (row + 1)) for row in range(rows)]
            model.generate(prompts, max_tokens=n_new)
            model.generate(prompts, max_tokens=3, temperature=0.7, top_k=n_prompt, seed=n_prompt)

    for rows in (1, 3):
        traced.clear()
        everything(rows)
        decode = [each for each in traced if each[0] == (rows, 1)]
        prefill = [each for each in traced if each[0] != (rows, 1)]
        assert 0 < len(decode) <= sizes
        # One prompt has chunks of 16, of 1 to 4 times 128, and those after the first 512; several have chunks of 128.
        assert 0 < len(prefill) <= (9 if rows == 1 else 1 + sizes)
        traced.clear()
        everything(rows)
        assert not traced, "compiled again after warm-up"


def plain_params(config: GPT2Config) -> Any:
    random, n = np.random.RandomState(3), config.n_embd

    def linear(n_in: int, n_out: int) -> Any:
        return {"w": random.standard_normal((n_in, n_out)) * 0.2, "b": np.zeros(n_out)}

    def norm() -> Any:
        return {"g": np.ones(n), "b": np.zeros(n)}

    def block() -> Any:
        attn = {"c_attn": linear(n, 3 * n), "c_proj": linear(n, n)}
        return {
            "ln_1": norm(),
            "attn": attn,
            "ln_2": norm(),
            "mlp": {"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)},
        }

    tables = {"wte": random.standard_normal((config.n_vocab, n)), "wpe": random.standard_normal((config.n_ctx, n))}
    return tables | {"blocks": [block() for _ in range(config.n_layer)], "ln_f": norm()}


# Text. The tests choose the model's tokens, so that only the loop around it is tested.


class Parrot(Model):
    """A model that generates the tokens of `said` after any prompt."""

    def __init__(self, said: list[int], tokenizer: Tokenizer | None, config: GPT2Config) -> None:
        super().__init__(small_params_of(config), config, tokenizer, backend="numpy")
        self._decoder._next_token_logits = self._say  # type: ignore[method-assign]
        self._said = said

    def _say(self, params: Any, tokens: Any, cache: Any, count: int, config: Any, xp: Any) -> Any:
        after = cache._replace(position=cache.position + count)
        logits = np.zeros((tokens.shape[0], self.config.n_vocab), dtype=np.float32)
        for row in range(tokens.shape[0]):
            step = int(after.position - 1) - self._first
            logits[row, self._said[step % len(self._said)]] = 50.0
        return logits, after

    def generate(self, prompt: Any, *settings: Any, **options: Any) -> Any:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._first = max(len(ids), 1) - 1
        return super().generate(prompt, *settings, **options)

    def stream(self, prompt: Any, *settings: Any, **options: Any) -> Any:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._first = max(len(ids), 1) - 1
        return super().stream(prompt, *settings, **options)


def small_params_of(config: GPT2Config) -> Any:
    return plain_params(GPT2Config(config.n_vocab, config.n_ctx, 2, 1, 1))


@pytest.fixture(scope="session")
def words(shakespeare: Model) -> Tokenizer:
    assert shakespeare.tokenizer is not None
    return shakespeare.tokenizer


def parrot(text: str | list[int], words: Tokenizer, n_ctx: int = 256) -> Parrot:
    said = words.encode(text) if isinstance(text, str) else text
    return Parrot(said, words, GPT2Config(n_vocab=1024, n_ctx=n_ctx, n_embd=2, n_head=1, n_layer=1))


def test_the_end_token_ends(words: Tokenizer) -> None:
    model = parrot([*words.encode("To be"), words.eos_token_id, *words.encode(" or not")], words)
    out = model.generate("ROMEO:")
    assert (out.text, out.finish_reason) == ("To be", "eos")
    assert out.token_ids == words.encode("To be")
    assert len(out.logprobs) == len(out.margins) == len(out.token_ids)
    going_on = model.generate("ROMEO:", ignore_eos=True, max_tokens=len(words.encode("To be or not")) + 1)
    assert going_on.text == "To be<|endoftext|> or not"
    assert going_on.finish_reason == "max_tokens"


def ended(model: Parrot, prompt: Any = (7,)) -> list[int]:
    """Return the tokens up to the end token that stops the model; all of them if none does."""
    out = model.generate(list(prompt), max_tokens=4)
    assert out.finish_reason == ("eos" if len(out.token_ids) < 4 else "max_tokens")
    return out.token_ids


def test_the_end_tokens_are_the_configs_else_the_tokenizers(words: Tokenizer) -> None:
    end = words.eos_token_id

    def model(eos: Any, tokenizer: Tokenizer | None) -> Parrot:
        config = GPT2Config(n_vocab=1024, n_ctx=64, n_embd=2, n_head=1, n_layer=1, eos_token_id=eos)
        return Parrot([40, end, 60, 70], tokenizer, config)

    assert ended(model(None, words)) == [40]
    assert ended(model(60, words)) == [40, end]  # The tokenizer's end token does not end it then.
    assert ended(model((70, 60), words)) == [40, end]
    assert ended(model((70, 99), None)) == [40, end, 60]
    assert ended(model(None, None)) == [40, end, 60, 70]
    assert ended(model(2000, words)) == [40]  # No model can choose this id.


def test_the_first_token_is_the_configs_else_the_tokenizers(shakespeare: Model, words: Tokenizer) -> None:
    def first(bos: int | None, eos: Any, tokenizer: Tokenizer | None) -> int:
        config = dataclasses.replace(shakespeare.config, bos_token_id=bos, eos_token_id=eos)
        model = Model(shakespeare.params, config, tokenizer, "numpy")
        found = model.generate([[]], max_tokens=3)[0]
        same = [id for id in (0, 5, 7) if model.generate([id], max_tokens=3).logprobs == found.logprobs]
        scored = model.score([11], convention="lm-eval").logprobs[0]
        ranked = model.rank([], [[11]])[0].logprob
        (id,) = same
        assert scored == pytest.approx(model.rank([id], [[11]])[0].logprob, rel=1e-5) == pytest.approx(ranked)
        return id

    assert first(5, (7, 11), words) == 5
    assert first(None, 7, words) == 0  # <|endoftext|> of the tokenizer
    assert first(None, (7, 11), None) == 7
    assert first(5, None, None) == 5


def test_an_empty_prompt_begins_with_the_end_token(shakespeare: Model) -> None:
    out = shakespeare.generate("", max_tokens=5)
    assert out.token_ids == shakespeare.generate([0], max_tokens=5).token_ids  # <|endoftext|> has id 0 here
    assert out.stats.prompt_tokens == 1
    nameless = Model(small_params("prime"), CONFIGS["prime"])
    with pytest.raises(PromptError, match="begins with the model's bos_token_id, and this model has none"):
        nameless.generate([[]])


def test_ids_without_a_token_are_never_sampled() -> None:
    characters = gpt_xp.tokenizer.bpe.CHARACTER_OF_BYTE
    tokenizer = Tokenizer({character: id for id, character in enumerate(characters)}, [])
    config = GPT2Config(n_vocab=263, n_ctx=64, n_embd=2, n_head=1, n_layer=1)
    params = small_params_of(config)
    params["wte"][256:] *= 100  # The model prefers the padding of the vocabulary.
    backends = [make_backend("numpy"), make_backend("array-api-strict")]
    for backend, temperature in itertools.product(backends, (0.0, 1.0)):
        free = Model(params, config, backend=backend).generate([7], max_tokens=40, temperature=temperature, seed=1)
        assert max(free.token_ids) >= 256
        model = Model(params, config, tokenizer, backend)
        assert max(model.generate("a", max_tokens=40, temperature=temperature, seed=1).token_ids) < 256


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("not", "To be, or "),
        (" or", "To be,"),
        (["xyz", ", o", "or"], "To be"),
        ("T", ""),
        ("To be, or not to be", ""),
        ("q", "To be, or not to be"),
        ("bee", "To be, or not to be"),
    ],
)
def test_a_stop_string_ends_before_itself(words: Tokenizer, stop: Any, text: str) -> None:
    model = parrot([*words.encode("To be, or not to be"), 0], words)
    out = model.generate("HAMLET:", stop=stop)
    assert out.text == text
    assert out.finish_reason == ("eos" if text.endswith("to be") else "stop")
    assert "".join(piece.text for piece in model.stream("HAMLET:", stop=stop)) == text


def test_nothing_that_may_begin_a_stop_string_is_shown_early(words: Tokenizer) -> None:
    model = parrot([*words.encode("a\n\nb\n\n"), *words.encode("\n c"), 0], words)
    pieces = [piece.text for piece in model.stream("x", stop=["\n\n\n"])]
    assert "".join(pieces) == "a\n\nb"
    assert not any(piece.endswith("\n") for piece in pieces)


def test_only_whole_characters_are_shown(words: Tokenizer) -> None:
    text = "naïve – ☃ 𝄞 ok"
    ids = words.encode(text)
    assert len(ids) > len(text)  # this small vocabulary needs several tokens for one character
    pieces = [piece.text for piece in parrot([*ids, 0], words).stream("x", max_tokens=None)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = parrot(ids, words).generate("x", max_tokens=ids.index(words.encode("☃")[0]) + 1)
    assert cut.text.endswith("\ufffd")  # one incomplete character at the very end
    assert cut.text == words.decode(cut.token_ids)


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_streamed_text_is_the_text(words: Tokenizer, text: str, stops: list[str], data: st.DataObject) -> None:
    """Many of the stop strings are parts of the text."""
    if text:
        begin = data.draw(st.integers(0, len(text) - 1))
        stops = [*stops, text[begin : begin + data.draw(st.integers(1, 4))]]
    ids = words.encode(text, special_tokens=False)
    model = parrot([*ids, 0], words)
    pieces = list(model.stream("x", stop=stops, max_tokens=None))
    result = pieces[-1].result
    assert result is not None
    assert "".join(piece.text for piece in pieces) == result.text
    ends = [text.index(stop) for stop in stops if stop in text]
    assert (result.finish_reason == "stop") == bool(ends)
    if not ends:
        assert result.text == text
    else:
        assert text.startswith(result.text)
        assert not any(stop in result.text for stop in stops)


def test_pieces_and_results_of_a_batch(shakespeare: Model) -> None:
    prompts = ["ROMEO:", "JULIET:\nO Romeo, Romeo"]
    pieces = list(shakespeare.stream(prompts, max_tokens=20))
    results = [piece.result for piece in pieces if piece.result]
    assert [piece.index for piece in pieces[-2:]] == [0, 1]
    for index, result in enumerate(results):
        assert result.text == "".join(piece.text for piece in pieces if piece.index == index)
        assert result.token_ids == [p.token_id for p in pieces if p.index == index and p.token_id is not None]
    assert [out.text for out in shakespeare.generate(prompts, max_tokens=20)] == [r.text for r in results]


def test_logprobs_are_those_of_the_model(shakespeare: Model) -> None:
    out = shakespeare.generate("ROMEO:", max_tokens=10, temperature=1.5, top_k=3, seed=1)
    ids = [*shakespeare.tokenizer.encode("ROMEO:"), *out.token_ids]
    logits = shakespeare.logits(ids).astype(np.float64)[-11:-1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.logprobs, expected[range(10), out.token_ids], atol=1e-4)


def test_statistics(backend: Backend) -> None:
    model = small(backend)
    stats = model.generate([[5, 6, 7], [8]], max_tokens=9)[0].stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.rows) == (4, 18, 2)
    assert (stats.backend, stats.device, stats.dtype) == (backend.name, backend.device, "float32")
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.time_to_first_token >= stats.prefill_seconds
    assert stats.peak_memory_bytes is None or stats.peak_memory_bytes > 1e6
    assert stats.decode_tokens_per_second == pytest.approx(16 / stats.decode_seconds)
    again = model.generate([[5, 6, 7], [8]], max_tokens=9)[0].stats
    assert again.compile_seconds == 0


def test_compiling_is_counted_apart() -> None:
    backend = make_backend("jax")
    config = GPT2Config(n_vocab=29, n_ctx=23, n_embd=10, n_head=5, n_layer=1)  # No other test has this shape.
    stats = Model(plain_params(config), config, backend=backend).generate([1], max_tokens=3).stats
    assert stats.compile_seconds > 0
    assert stats.time_to_first_token > stats.prefill_seconds


# Arguments that are refused before anything is computed.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": [101]}, PromptError, r"token id 101 is not in the model's vocabulary: ids go from 0 to 100"),
        ({"prompt": [-1]}, PromptError, r"token id -1 is not in the model's vocabulary"),
        ({"prompt": [[1.5]]}, PromptError, r"a prompt is text \(str\) or a list of token ids"),
        ({"prompt": "text"}, PromptError, r"this model has no tokenizer"),
        ({"prompt": b"text"}, PromptError, r"a prompt is text \(str\) .* not b'text'"),
        ({"prompt": [b"text"]}, PromptError, r"a prompt is text \(str\) .* not b'text'"),
        ({"prompt": None}, PromptError, r"a prompt is text \(str\) .* not None"),
        ({"prompt": [True]}, PromptError, r"a prompt is text \(str\)"),
        ({"prompt": [1], "num_samples": 10**9}, DeviceMemoryError, r"the cache for 1000000000 rows up to [\d.]+ GB"),
        ({"prompt": [1], "temperature": 1e300}, SettingError, r"temperature must be 0 \(greedy\) or a number from"),
        ({"prompt": [1], "max_tokens": 0}, SettingError, r"max_tokens must be a whole number of at least 1, not 0"),
        ({"prompt": [1], "max_tokens": 1.5}, SettingError, r"max_tokens"),
        ({"prompt": [1], "num_samples": 0}, SettingError, r"num_samples must be a whole number of at least 1"),
        ({"prompt": [1], "num_samples": None}, SettingError, r"num_samples"),
        ({"prompt": [1], "stop": "x"}, SettingError, r"a stop string needs a tokenizer"),
        (
            {"prompt": [1], "stop": [""]},
            SettingError,
            r"stop must be one or several strings of at least one char",
        ),
        ({"prompt": [1], "temperature": -1}, SettingError, r"temperature"),
        (
            {"prompt": [1], "settings": {"top_k": 3}},
            SettingError,
            r"settings must be a gpt_xp.Gen.*, not {",
        ),
        ({"prompt": [1], "tempature": 1}, TypeError, "no option 'tempature'; the nearest is 'temperature'"),
    ],
)
def test_what_generate_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small(make_backend("numpy"))
    with pytest.raises(error, match=message):
        model.stream(**arguments)  # The call itself raises, not the first piece.


@pytest.mark.parametrize("ids", [[101], [-1], [], [[]], [1.0], ["a"], [[[1]]], [0] * 38, [[1, 2], [3]]])
def test_what_logits_refuses(backend: Backend, ids: Any) -> None:
    with pytest.raises(PromptError):
        small(backend).logits(ids)


def test_ids_beyond_the_table_fail_when_they_are_used() -> None:
    # This is the most common way to add a token: [PAD] in the tokenizer, and a table that is not resized.
    encoder = {character: id for id, character in enumerate(gpt_xp.tokenizer.bpe.CHARACTER_OF_BYTE)}
    tokenizer = Tokenizer(encoder | {"[PAD]": 256, EOS: 257}, [], ["[PAD]"])
    config = GPT2Config(n_vocab=256, n_ctx=11, n_embd=6, n_head=3, n_layer=1)
    model = Model(plain_params(config), config, tokenizer)
    assert model.generate("a[PAD]b", max_tokens=3, temperature=1.0, seed=1).finish_reason == "max_tokens"
    message = r"token id 256, '\[PAD\]' in the tokenizer, is not in the model's vocabulary: ids go from 0 to 255"
    for use in (
        lambda: model.generate("a[PAD]b", special_tokens=True),
        lambda: model.score("a[PAD]b", special_tokens=True),
        lambda: model.rank("a", ["b", "[PAD]"], special_tokens=True),
        lambda: model.rank("a[PAD]", ["b"], special_tokens=True),
    ):
        with pytest.raises(PromptError, match=message):
            use()
    with pytest.raises(PromptError, match="bos_token_id, and this model has none"):
        model.generate("")


def test_special_tokens_are_plain_text_unless_they_are_allowed(shakespeare: Model, words: Tokenizer) -> None:
    text = "ROMEO:<|endoftext|>JULIET:"
    plain, special = words.encode(text), words.encode(text, special_tokens=True)
    assert len(special) < len(plain)
    for allowed, ids in ((False, plain), (True, special)):
        found = shakespeare.generate(text, max_tokens=3, special_tokens=allowed)
        assert found.token_ids == shakespeare.generate(ids, max_tokens=3).token_ids
        assert found.stats.prompt_tokens == len(ids)
        score = shakespeare.score(text, special_tokens=allowed)
        assert score.token_ids.tolist() == ids
        assert (score.n_characters, score.n_bytes) == (len(text), len(text))
        ranked = shakespeare.rank(text, [" a"], special_tokens=allowed)[0]
        assert ranked.logprob == pytest.approx(shakespeare.rank(ids, [words.encode(" a")])[0].logprob)


def test_no_prompts_are_no_results(shakespeare: Model) -> None:
    assert shakespeare.generate([]) == []


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
def test_weights_that_are_not_numbers_are_an_error(options: dict[str, Any]) -> None:
    params = small_params("prime")
    params["blocks"][1]["attn"]["c_proj"]["b"][3] = np.nan
    model = Model(params, CONFIGS["prime"], backend=make_backend("numpy"))
    with pytest.raises(NumericalError, match="the model's logits are not finite in float32"):
        model.generate([1, 2, 3], **options)


def test_running_out_of_memory_names_sizes() -> None:
    model = small(make_backend("numpy"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no")

    model._decoder._next_token_logits = fail
    with pytest.raises(
        DeviceMemoryError, match=r"numpy ran out of memory on cpu: the params take 171\.9 kB in float32"
    ) as error:
        model.generate([[1], [2]])
    assert "cache for 2 rows" in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cupy", "jax:gpu", "torch:cuda"])
def test_running_out_of_memory_on_a_gpu(name: str) -> None:
    backend = make_backend(name)
    config = GPT2Config(n_vocab=31, n_ctx=1024, n_embd=1024, n_head=2, n_layer=1)
    model = Model(plain_params(config), config, backend=backend)
    rows = int(backend.device_memory / (2 * config.n_ctx * config.n_embd * 4)) * 2  # a cache twice the memory
    with pytest.raises(DeviceMemoryError, match=rf"{backend.name} ran out of memory on .* the cache for {rows} rows"):
        model.generate([[1]] * rows, max_tokens=1024)
    assert model.generate([1], max_tokens=3).token_ids  # The model can go on.
