"""Draw docs/pictures/look.png: the page of `gpt-xp look` for the bundled model, in Chromium.

PYTHONPATH=tests/support python docs/pictures/make_look.py    (pip install -e '.[dev,browser]')
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from browser import Opener, chromium
from PIL import Image  # comes with matplotlib

PROMPT = "JULIET:\nO Romeo, Romeo! wherefore art"
LAYER, HEAD = 1, 2  # chosen in the picture: " art" looks back at " where"


def main() -> None:
    """Write the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = Path(folder) / "look.html"
        command = ["look", "-m", "shakespeare", "--backends", "numpy,jax,array-api-strict", "--html", str(page), PROMPT]
        subprocess.run([sys.executable, "-m", "gpt_xp", *command], check=True)
        opened = Opener(browser, Path(folder))(page.as_uri())
        for key, times in (("Home", 1), ("PageUp", 1), ("ArrowDown", LAYER), ("ArrowRight", HEAD)):
            for _ in range(times):
                opened.locator("#all-heads").press(key)
        opened.evaluate("document.activeElement.blur()")
        height = opened.evaluate("document.querySelector('footer').getBoundingClientRect().top + scrollY")
        opened.screenshot(
            path=f"{folder}/look.png", full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": height}
        )
        with Image.open(f"{folder}/look.png") as image:
            few_colors(image.convert("RGB")).save(Path(__file__).with_name("look.png"), optimize=True)


def few_colors(image: Image.Image) -> Image.Image:
    """Keep the 256 most frequent colors, and take the nearest of them for the others: the file is half as large."""
    counted = sorted(image.getcolors(image.width * image.height), reverse=True)
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for _, color in counted[:256] for channel in color])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
