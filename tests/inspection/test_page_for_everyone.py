"""The page of `gpt-xp look` by keyboard, for a screen reader, in both color schemes, on small screens."""

from typing import Any

import numpy as np
import pytest
from browser import Opener, drawn, said, table, text
from looks import random_look
from third_party import third_party_installed

from gpt_xp import Model
from gpt_xp.config import SIZES
from gpt_xp.inspection.results import Look

pytestmark = pytest.mark.browser

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"


@pytest.fixture(scope="module")
def look(shakespeare: Model) -> Look:
    """A look at the bundled model, with a right backend and a wrong one."""
    with third_party_installed():
        return shakespeare.look(PROMPT, ["numpy", "wrong-gelu"])


def focused(opened: Any) -> str:
    return str(opened.evaluate("document.activeElement.id || document.activeElement.className"))


def tab_to(opened: Any, name: str) -> None:
    """Press Tab until the element with this id or class has the focus."""
    for _ in range(60):
        opened.keyboard.press("Tab")
        if focused(opened) == name:
            return
    pytest.fail(f"Tab does not reach {name}")


def press(opened: Any, key: str, times: int = 1) -> None:
    for _ in range(times):
        opened.keyboard.press(key)


def test_by_keyboard_from_the_first_token_to_a_cell_of_a_head(
    open_page: Opener, look: Look, shakespeare: Model
) -> None:
    opened = open_page(look)
    tab_to(opened, "cell")
    press(opened, "Home")
    assert said(opened) == "Position 0, ROMEO, block 5"
    press(opened, "ArrowRight", 9)
    assert said(opened) == "Position 9, ␣what, block 5"
    tab_to(opened, "all-heads")
    press(opened, "ArrowUp", 2)
    press(opened, "ArrowRight", 4)
    assert said(opened).startswith("Layer 3, head 4: ␣what (position 9) looks at ")
    tab_to(opened, "one-head")
    press(opened, "Home")
    press(opened, "ArrowRight", 3)
    weight = shakespeare.trace(PROMPT, "blocks.3.attn.hook_pattern")["blocks.3.attn.hook_pattern"][4, 9, 3]
    shown = f"{100 * weight:.{2 if weight < 0.0995 else 1}f} %"
    assert said(opened) == (
        f"Layer 3, head 4. Position 9, ␣what, looks at position 3, But: {shown}. Arrow keys move."
    )  # fmt: skip


def test_each_picture_is_one_stop_of_the_tab_key(open_page: Opener, look: Look) -> None:
    opened, stops = open_page(look), []
    while len(stops) < 60 and not (stops and opened.evaluate("document.activeElement === document.body")):
        opened.keyboard.press("Tab")
        stops.append(opened.evaluate("document.activeElement.closest('section')?.id"))
    assert [stops.count(each) for each in ("tokens", "distances")] == [1, 2]
    assert stops.count("lens") <= 3  # the cells, and tables that can be scrolled
    assert stops.count("attention") <= 4


def test_a_choice_holds_everywhere(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    opened.locator("#lens tbody tr").nth(3).locator("td").nth(12).click()  # the layers from above: 5, 4, 3, 2
    assert opened.locator("#strip [aria-selected]").get_attribute("aria-label").startswith("position 12,")
    assert "(position 12)" in text(opened, "#next-title")
    assert text(opened, "#lens-best h3") == "block 2, position 12"
    assert text(opened, "#attention-sentence").startswith("Layer 2, head 0: ␣th (position 12)")
    assert text(opened, "#distance-sentence").startswith("block 2, position 12 ␣th: the error is ")
    opened.locator("#distance-table tbody tr").nth(0).locator("td").nth(2 + 5).click()  # numpy, block 4
    assert text(opened, "#lens-best h3") == "block 4, position 12"
    assert text(opened, "#distance-about h3") == "numpy float32: inside"
    opened.locator("#errors").press("ArrowLeft")
    assert said(opened).startswith("numpy float32, block 4, position 11 ght: the error is ")
    assert "(position 11)" in text(opened, "#next-title")


def test_a_click_in_a_picture_chooses_what_is_there(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    for selector, place, expected in (
        ("#all-heads", (22 + 43 * 3 + 20, 18 + 43 * 1 + 20), "Layer 1, head 3"),
        ("#one-head", (84 + 15 * 2 + 7, 84 + 15 * 7 + 7), "(position 7)"),
    ):
        opened.locator(selector).click(position=dict(zip("xy", place, strict=True)))
        assert expected in text(opened, "#attention-sentence")


def test_a_choice_does_not_scroll_the_page(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    picture = opened.locator("#errors")
    picture.scroll_into_view_if_needed()
    picture.focus()
    assert opened.evaluate("scrollY") > 0
    before = picture.bounding_box()["y"]
    press(opened, "ArrowUp", 3)
    press(opened, "ArrowLeft", 20)
    assert "position 4 " in said(opened)
    assert picture.bounding_box()["y"] == pytest.approx(before, abs=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("is_by_button", [False, True])
@pytest.mark.parametrize("width", [1280, 320])
def test_axe_finds_nothing(open_page: Opener, look: Look, scheme: str, is_by_button: bool, width: int) -> None:
    """In both schemes, chosen by the system or by the button, with pictures and with tables."""
    from axe_playwright_python.sync_playwright import Axe

    other = {"light": "dark", "dark": "light"}[scheme]
    opened = open_page(look, width, other if is_by_button else scheme)
    if is_by_button:
        opened.locator("#theme").click()
    assert opened.locator("body").evaluate("body => getComputedStyle(body).colorScheme") == scheme
    for summary in opened.locator("summary").all():
        summary.click()
    for _ in range(2):
        found = Axe().run(opened)
        assert found.violations_count == 0, found.generate_report()
        opened.locator("#tables").click()


def test_a_scheme_keeps_what_was_set(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    opened.locator("#set-topK + input").fill("7")
    opened.locator("#strip [role=option]").nth(4).click()
    opened.locator("#theme").click()
    assert opened.locator("#set-topK + input").input_value() == "7"
    assert text(opened, "#next-notes").startswith("7 tokens are left.")
    assert "(position 4)" in text(opened, "#next-title")


@pytest.mark.parametrize("width", [320, 640])  # 640 is 1280 at a zoom of 200 %.
@pytest.mark.parametrize("is_large", [False, True])
def test_nothing_is_wider_than_a_small_screen(open_page: Opener, look: Look, width: int, is_large: bool) -> None:
    opened = open_page(random_look(SIZES["124M"], 300) if is_large else look, width)
    for _ in range(2):
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        left = opened.locator("section").evaluate_all("all => all.map(each => each.getBoundingClientRect().left)")
        assert len(set(left)) == 1  # one column
        opened.locator("#tables").click()


def test_every_picture_has_a_table(open_page: Opener, look: Look) -> None:
    opened = open_page(look)
    pictures = opened.locator("canvas, svg")
    assert pictures.count() == 4
    opened.locator("#tables").click()
    assert [each.is_visible() for each in pictures.all()] == [False] * pictures.count()
    layers, n_seq = look.config.n_layer, len(look.token_ids)
    names = ("#tokens-table", "#lens-chart", "#heads-table", "#errors-table")
    assert [len(table(opened, name)) for name in names] == [n_seq, layers + 1, layers, n_seq]
    shown = [[float(each) for each in row[2:-2]] for row in table(opened, "#errors-table")]
    expected = look.distances[1].relative.T
    assert shown == [[float(f"{each:.1e}") for each in row] for row in expected]
    assert [float(row[-1]) for row in table(opened, "#errors-table")] == [
        float(f"{each:.3g}") for each in look.distances[1].margins
    ]


def test_colors_are_even_and_in_order(open_page: Opener, look: Look) -> None:
    """In each scheme the lightness of the palette rises or falls in equal steps; the lens shows p by it."""
    for scheme in ("light", "dark"):
        opened = open_page(look, scheme=scheme)
        drawn(opened)
        cells = opened.locator("#lens .grid tbody td").evaluate_all(
            "all => all.map(each => [getComputedStyle(each).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number),"
            " each.title])"
        )
        lightness = np.array([oklab_lightness(color) for color, _ in cells])
        p = np.array([float(title.split(" ")[-2].lstrip("<")) / 100 for _, title in cells])
        order = np.argsort(p)
        steps = np.diff(lightness[order]) * (1 if scheme == "dark" else -1)
        assert steps.min() > -0.012  # p is shown with three digits
        assert abs(lightness[order[-1]] - lightness[order[0]]) > 0.5


def oklab_lightness(color: list[int]) -> float:
    """Return the lightness of an sRGB color in OKLab (Ottosson 2020)."""
    c = np.array(color) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]]) @ linear  # fmt: skip
    return float(np.array([0.2104542553, 0.793617785, -0.0040720468]) @ np.cbrt(lms))
