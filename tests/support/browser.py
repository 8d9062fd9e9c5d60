"""Opens pages in Chromium, without a network, and keeps whatever the browser complains about."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libraries import skipping_what_is_missing

PATIENCE = 120_000  # milliseconds until the browser counts as hung; a busy machine needs much less
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium. Skip the test, with the reason, if it cannot be started here."""
    with skipping_what_is_missing("browser"):
        from playwright.sync_api import sync_playwright

        path = next(filter(None, map(shutil.which, NAMES)), None)
        if path is None:
            raise ModuleNotFoundError("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opener:
    """Opens pages for one test. `problems` are errors of the script, violations of the policy, and requests."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self._browser, self._folder = browser, folder
        self._contexts: list[Any] = []
        self.problems: list[str] = []

    def __call__(self, content: Any, width: int = 1280, scheme: str = "light", **settings: Any) -> Any:
        """Open a look, or the text or the address of a page, and wait until it is drawn."""
        address = content
        if not str(content).startswith(("file:", "http:")):
            file = self._folder / f"page-{len(self._contexts)}.html"
            file.write_text(content if isinstance(content, str) else content._page(), encoding="utf-8")
            address = file.as_uri()
        offline = address.startswith("file:")
        context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=offline, **settings
        )
        context.set_default_timeout(PATIENCE)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self._heard(message.type, message.text))
        page.on("pageerror", lambda error: self._heard("error", str(error)))
        page.on("request", lambda request: self._asked(address, request.url))
        page.goto(address)
        drawn(page)
        return page

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    def _asked(self, address: str, url: str) -> None:
        if not (url == address or (address.startswith("http:") and url.startswith(address))):
            self.problems.append(f"it asked for {url}")

    def close(self) -> None:
        for context in self._contexts:
            context.close()


def drawn(page: Any) -> None:
    """Wait until a page, or a frame, shows a look."""
    page.locator("#strip [aria-selected]").wait_for()


def table(page: Any, selector: str) -> list[list[str]]:
    """Return the texts of the rows of a table, without its head."""
    rows: list[list[str]] = page.locator(f"{selector} tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return rows


def text(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


def filled(page: Any, selector: str) -> str:
    """Return the text of a box, as soon as it has any."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).not_to_have_value("", timeout=PATIENCE)
    return str(page.locator(selector).input_value())


def said(page: Any) -> str:
    """Return what a screen reader was told last."""
    return str(page.locator("#live").text_content())
