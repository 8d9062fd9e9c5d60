"""The page that `gpt-xp look --serve` serves, in a real browser: it asks for what it does not have."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from browser import Opener, drawn, table, text
from commands import PATIENCE

from gpt_xp import Model
from gpt_xp.inspection.server import LookServer

pytestmark = pytest.mark.browser

PROMPT = "To be, or not to be, that is the question"


class Served(LookServer):
    """A server whose looks are as large as a test wants them."""

    max_size = 8_000_000

    def __init__(self, model: Model) -> None:
        def looking(text: Any, position: int | None, again: bool) -> Any:
            return model.look(text, "numpy" if again else None, position=position, max_size=self.max_size)

        super().__init__()
        self.model, self.look, self.looking = model, model.look(PROMPT, "numpy"), looking


@pytest.fixture
def served(shakespeare: Model) -> Iterator[Served]:
    server = Served(shakespeare)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


def ask(opened: Any, prompt: str) -> None:
    opened.locator("#prompt").fill(prompt)
    opened.get_by_role("button", name="Look", exact=True).click()


def test_another_prompt(open_page: Opener, served: Served, shakespeare: Model) -> None:
    opened = open_page(served.url)
    assert opened.locator("#prompt").input_value() == PROMPT
    ask(opened, "ROMEO: </script>")
    ids = shakespeare.look("ROMEO: </script>").token_ids
    opened.locator("#strip [role=option]").nth(len(ids) - 1).wait_for()
    opened.locator("#strip [role=option]").nth(len(ids)).wait_for(state="detached")
    assert opened.locator("#busy").is_hidden()
    assert opened.locator("#prompt").input_value() == "ROMEO: </script>"
    assert table(opened, "#distance-table")[0][1] == "✓ inside"


def test_only_the_answer_to_the_latest_request_is_shown(open_page: Opener, served: Served) -> None:
    opened = open_page(served.url)
    tokens = opened.locator("#strip [role=option]")
    before, looking, begun = tokens.count(), served.looking, threading.Event()
    may_end = {name: threading.Event() for name in ("one", "two")}

    def slow(prompt: Any, position: int | None, again: bool) -> Any:
        begun.set()
        assert may_end[prompt].wait(PATIENCE)
        return looking(prompt, position, again)

    served.looking = slow
    ask(opened, "one")
    assert begun.wait(PATIENCE)  # The model computes for one request at a time.
    ask(opened, "two")
    may_end["one"].set()
    while served.look.prompt != "one":
        opened.wait_for_timeout(100)
    opened.wait_for_timeout(500)  # The first answer comes, and is not shown.
    assert (tokens.count(), opened.locator("#busy").is_visible()) == (before, True)
    may_end["two"].set()
    opened.locator("#busy").wait_for(state="hidden")
    assert opened.locator("#prompt").input_value() == "two"
    assert tokens.count() < before


def test_an_error_is_shown_and_the_page_stays(open_page: Opener, served: Served) -> None:
    opened = open_page(served.url)
    ask(opened, "word " * 300)
    problem = opened.get_by_role("alert")
    problem.wait_for()
    assert "the context has room for 256" in problem.inner_text() or "tokens" in problem.inner_text()
    drawn(opened)
    assert [each for each in open_page.problems if "400" not in each] == []  # The console tells of the status.
    open_page.problems.clear()
    ask(opened, "To be")
    problem.wait_for(state="hidden")


def test_a_server_that_has_ended(open_page: Opener, served: Served) -> None:
    opened = open_page(served.url)
    opened.route("**/look", lambda route: route.abort())
    ask(opened, "To be")
    opened.get_by_text("The server cannot be reached").wait_for()
    open_page.problems.clear()


def test_exact_logits_at_another_position(open_page: Opener, served: Served, shakespeare: Model) -> None:
    opened = open_page(served.url)
    exact = opened.get_by_role("button", name="Ask for all logits here")
    assert exact.is_hidden()
    opened.locator("#strip [role=option]").nth(2).click()
    assert "Approximate" in text(opened, "#next-notes")
    opened.locator("#set-temperature + input").fill("10")
    exact.click()
    exact.wait_for(state="hidden")
    assert "Approximate" not in text(opened, "#next-notes")
    assert "(position 2)" in text(opened, "#next-title")
    assert opened.locator("#set-temperature + input").input_value() == "10"
    logits = np.float64(shakespeare.logits(served.look.token_ids)[2]) / 10
    shown = opened.evaluate("[...document.getElementById('next-list').found.probabilities]")
    expected = np.sort(np.exp(logits) / np.exp(logits).sum())[::-1]
    np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-6)
    assert table(opened, "#distance-table")[0][1] == "✓ inside"  # They are kept.


def test_the_exact_weights_of_a_head(open_page: Opener, served: Served, shakespeare: Model) -> None:
    ids = np.random.default_rng(3).integers(0, 1024, 101).tolist()
    served.look = replace(shakespeare.look(ids, max_size=350_000), prompt=None)
    assert served.look.attention.kind == "small"
    opened = open_page(served.url)
    exact = opened.get_by_role("button", name="Ask for the exact weights of this head")
    assert exact.is_hidden()  # Those of the last token are here.
    opened.locator("#strip [role=option]").nth(40).click()
    assert "the largest weight of a square" in text(opened, "#attention-sentence")
    opened.locator("#all-heads").press("ArrowRight")
    exact.click()
    exact.wait_for(state="hidden")
    assert "the largest weight of a square" not in text(opened, "#attention-sentence")
    opened.locator("#tables").click()
    shown = [float(row[2]) for row in table(opened, "#keys-table")]
    pattern = shakespeare.trace(ids, "blocks.5.attn.hook_pattern")["blocks.5.attn.hook_pattern"]
    np.testing.assert_allclose(shown, pattern[1, 40, :41], rtol=0, atol=2e-6)
