"""Floating-point flags that BLAS raises without a reason: the user sees no warning, and NumPy's settings stay.

OpenBLAS 0.3.31 computes products by a matrix of five columns on lanes that nobody reads, with what lies on the stack.
Where that is no number, the processor's flag "invalid" is raised, and NumPy warns. The results are right: of 10,800
products of small sizes on a stack full of NaN, on AVX-512, 27 raised the flag, and every result was right.
"""

from typing import Any

import numpy as np
import pytest
from libraries import make_backend
from small_models import CONFIGS, small_params, small_tokens

from gpt_xp import Model
from gpt_xp.errors import NumericalError


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every product raise all flags that NumPy is set to check; the list counts the products."""
    found: list[str] = []
    original = np.matmul

    def matmul(*args: Any, **kwargs: Any) -> Any:
        found.append("a product")
        large = np.float32([1e38, np.inf, 1])
        large * large - large, large / np.float32(0), np.float32([1e-38]) * np.float32([1e-38])
        return original(*args, **kwargs)

    monkeypatch.setattr(np, "matmul", matmul)
    return found


@pytest.mark.parametrize("setting", ["warn", "raise"])  # a warning is an error in tests
@pytest.mark.parametrize("name", ["numpy", "array-api-strict"])
def test_flags_of_products_reach_nobody(name: str, setting: Any, flags: list[str]) -> None:
    tokens = small_tokens("long")[0].tolist()
    with np.errstate(all=setting):
        before = np.geterr()
        model = Model(small_params("long"), CONFIGS["long"], backend=make_backend(name))
        for _ in range(2):
            model.generate([tokens[:5], tokens[:3]], max_tokens=7, temperature=0.8, seed=1)
        model.logits(tokens)
        model.score(tokens)
        model.rank(tokens[:3], [tokens[3:5], tokens[5:9]])
        assert np.geterr() == before
        assert len(flags) > 100
        with pytest.raises((RuntimeWarning, FloatingPointError)):
            np.matmul(np.ones((2, 2)), np.ones((2, 2)))  # the user's own products are as they were


def test_logits_that_are_not_finite_are_an_error_all_the_same() -> None:
    params = small_params("prime")
    params["blocks"][0]["mlp"]["c_fc"]["w"][3, 5] = np.inf
    with pytest.raises(NumericalError, match="logits are not finite"):
        Model(params, CONFIGS["prime"], backend="numpy").generate([1, 2, 3])
