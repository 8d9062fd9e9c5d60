"""The fixture `cupy`, for tests of CuPy without a GPU."""

import pytest
from cuda_by_numpy import ByNumPy
from fake_cupy import FakeCuPy
from gpt_xp_backends.cupy_backend import adapter
from gpt_xp_backends.numpy_backend import namespace

from gpt_xp.generation import decoder


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCuPy:
    fake = FakeCuPy(ByNumPy(monkeypatch))
    monkeypatch.setattr(adapter, "import_library", lambda name, fix: fake)
    monkeypatch.setattr(adapter, "_namespace", lambda cupy: namespace())
    for name in ("next_token_logits", "candidate_logits"):
        monkeypatch.setattr(decoder, name, fake.watched(getattr(decoder, name)))
    monkeypatch.delenv("GPT_XP_CUPY_GRAPH", raising=False)
    return fake
