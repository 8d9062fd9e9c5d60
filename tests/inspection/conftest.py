"""The browser of the tests of the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Opener, chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Return a function that opens a page; afterwards, nothing may have been complained about or asked for."""
    opener = Opener(browser, tmp_path)
    yield opener
    opener.close()
    assert opener.problems == []
