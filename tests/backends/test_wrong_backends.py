"""The backends of `wrong_backends`: found where they are installed, and wrong where and as much as they should be.

That `gpt-xp compare` catches them is tested with it.
"""

import functools
import math

import pytest
from commands import in_a_new_process
from folders import TESTS
from third_party import WRONG_BACKENDS, installed

from gpt_xp.errors import BackendError
from gpt_xp.registry import get_backend
from gpt_xp.tolerances import TOLERANCE

RIGHT = TOLERANCE["logits", "float32"]

# The largest error of the logits of backend NAME, relative to the largest logit, in float32: all tokens at once without
# a cache, and one by one with it. "sharp" is left out for those that are right: it magnifies rounding too.
ERRORS = """
import json
import numpy as np
import gpt_xp
from gpt_xp.kv_cache import new_cache
from small_models import CONFIGS, small_params, small_tokens
from third_party import with_large_scores

def full(model, tokens):
    return model.backend.compile(gpt_xp.gpt2)(model.params, tokens, model.config, xp=model.backend.xp)

def cached(model, tokens):
    start = np.zeros(len(tokens), dtype=np.int32)
    cache = new_cache(model.config, model.params["wpe"], 64, start, model.backend.xp)
    gpt2_with_cache, logits = model.backend.compile(gpt_xp.gpt2_with_cache), []
    for end in range(17, tokens.shape[1] + 1):
        piece = tokens[:, : end] if end == 17 else tokens[:, end - 1 : end]
        new, cache = gpt2_with_cache(model.params, piece, model.config, cache, xp=model.backend.xp)
        logits.append(new)
    return np.concatenate(logits, axis=1)

def error(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())

bundled = gpt_xp.load("shakespeare", backend="numpy", dtype="float64")
text = bundled.tokenizer.encode("ROMEO:\\nBut, soft! what light through yonder window breaks? It is the east.")
models = {
    "bundled": (bundled.params, bundled.config, np.asarray([text])),
    "large scores": (with_large_scores(bundled.params, bundled.config, layer=3), bundled.config, np.asarray([text])),
    "sharp": (small_params("sharp"), CONFIGS["sharp"], small_tokens("sharp")),
}
errors = {}
for name, (params, config, tokens) in models.items():
    expected = gpt_xp.gpt2(params, tokens, config)  # before the backend is made, for one spoils the whole process
    model = gpt_xp.Model(params, config, backend=NAME)
    errors |= {name: error(full(model, tokens), expected), f"{name}, cached": error(cached(model, tokens), expected)}
print(json.dumps(errors))
"""


@functools.cache
def errors(name: str) -> dict[str, float]:
    found: dict[str, float] = in_a_new_process(
        f"NAME = {name!r}\n{ERRORS}", **installed(WRONG_BACKENDS, TESTS / "support")
    )
    return found


def test_they_are_there_only_where_they_are_installed() -> None:
    code = "import json, gpt_xp; print(json.dumps(gpt_xp.load(backend='right-numpy').backend.name))"
    assert in_a_new_process(code, **installed(WRONG_BACKENDS)) == "right-numpy"
    with pytest.raises(BackendError, match="there is no backend 'right-numpy'"):
        get_backend("right-numpy")


def test_they_are_listed() -> None:
    code = """
import json, gpt_xp
print(json.dumps({info.name: [info.problem, len(info.devices)] for info in gpt_xp.backends()}))
"""
    listed = in_a_new_process(code, **installed(WRONG_BACKENDS))
    for name in ("right-numpy", "wrong-softmax", "wrong-float16", "wrong-gelu", "wrong-cache"):
        assert listed[name] == [None, 1]


def test_a_right_one_is_right() -> None:
    found = errors("right-numpy")
    assert max(error for name, error in found.items() if "sharp" not in name) < RIGHT / 2
    assert found["sharp"] < 1e-4


def test_softmax_without_the_maximum_is_wrong_where_scores_are_large() -> None:
    found = errors("wrong-softmax")
    assert max(found["bundled"], found["bundled, cached"]) < RIGHT / 2
    assert all(math.isnan(error) for name, error in found.items() if "bundled" not in name)


@pytest.mark.parametrize("name", ["wrong-float16", "wrong-gelu"])
def test_imprecise_products_and_another_gelu_are_a_little_wrong(name: str) -> None:
    found = errors(name)
    assert 5 * RIGHT < found["bundled"] < 2e-3
    assert 5 * RIGHT < found["bundled, cached"] < 2e-3
    assert found["sharp"] > 5 * RIGHT


def test_a_cache_that_is_off_by_one_is_wrong_where_there_is_a_cache() -> None:
    found = errors("wrong-cache")
    assert max(found["bundled"], found["large scores"]) < RIGHT / 2
    assert min(error for name, error in found.items() if "cached" in name) > 0.1


def test_the_other_gelu_is_the_one_by_erf() -> None:
    code = """
import json, math
import numpy as np
import gpt_xp
from gpt_xp.registry import get_backend
x = np.linspace(-9, 9, 4001)
erf = x * np.asarray([(1 + math.erf(each / math.sqrt(2))) / 2 for each in x])
xp = get_backend("wrong-gelu").xp
errors = [np.abs(gpt_xp.transformer.gelu(x.astype(dtype), xp) - erf).max().item() for dtype in ("float32", "float64")]
print(json.dumps([*errors, np.abs(gpt_xp.transformer.gelu(x, np) - erf).max().item()]))
"""
    float32, float64, right = in_a_new_process(code, **installed(WRONG_BACKENDS))
    assert float64 < 1e-14
    assert float32 < 1e-6
    assert right > 4e-4
