"""Print a pip constraint for each lower bound in pyproject.toml: the oldest versions that gpt-xp is tested with."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["jax"], *extras["dev"]]:
    if bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
