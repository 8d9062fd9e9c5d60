"""The real thing, for those who can reach it: pytest -m network. It fetches half a gigabyte from each source."""

import importlib.util
from pathlib import Path

import pytest

import gpt_xp
from gpt_xp.hub import published, store

PROMPT = "Alan Turing theorized that computers would one day become"
# What picoGPT's README shows for 124M, greedy, 40 tokens.
CONTINUATION = (
    " the most powerful machines on the planet.\n\n"
    "The computer is a machine that can perform complex calculations, and it can perform these calculations in a way "
    "that is very similar to the human brain.\n"
)


@pytest.mark.network
@pytest.mark.parametrize("source", store.SOURCES)
def test_124m_says_what_picogpts_readme_shows(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "openai" and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    monkeypatch.setenv("GPT_XP_HOME", str(tmp_path))
    monkeypatch.setattr(published, "HUB", "https://huggingface.co")
    monkeypatch.setattr(published, "BUCKET", "https://openaipublic.blob.core.windows.net/gpt-2/models")
    folder = store.pull(published.MODELS["124M"], source)
    out = gpt_xp.load(folder, backend="numpy").generate(PROMPT, max_tokens=40)
    assert len(out.token_ids) == 40
    assert out.text.rstrip() == CONTINUATION.rstrip()
