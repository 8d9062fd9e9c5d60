"""Hints to install an extra: the command works where gpt-xp came from."""

import importlib.metadata
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import ROOT

from gpt_xp import installation
from gpt_xp.installation import install_command

REPOSITORY = "https://example.org/gpt-xp.git"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Set what pip has recorded of where gpt-xp came from, its direct_url.json."""

    def record(origin: Any) -> None:
        text = None if origin is None else json.dumps(origin)
        monkeypatch.setattr(
            importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text)
        )
        installation._origin.cache_clear()

    yield record
    installation._origin.cache_clear()


def test_a_checkout(recorded: Callable[[Any], None], tmp_path: Path) -> None:
    folder = tmp_path / "my gpt-xp"
    folder.mkdir()
    recorded({"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(install_command("jax")) == ["pip", "install", "-e", f"{folder}[jax]"]
    recorded({"url": folder.as_uri(), "dir_info": {}})
    assert shlex.split(install_command("jax")) == ["pip", "install", f"{folder}[jax]"]


def test_a_wheel(recorded: Callable[[Any], None], tmp_path: Path) -> None:
    wheel = tmp_path / "gpt_xp-0.1.0-py3-none-any.whl"
    wheel.touch()
    recorded({"url": wheel.as_uri(), "archive_info": {}})
    assert install_command("jax") == f"pip install '{wheel}[jax]'"


def test_a_repository(recorded: Callable[[Any], None]) -> None:
    recorded({"url": REPOSITORY, "vcs_info": {"vcs": "git", "commit_id": "0" * 40}})
    assert install_command("jax") == f"pip install 'gpt-xp[jax] @ git+{REPOSITORY}'"


@pytest.mark.parametrize("origin", [None, {}, {"url": "file:///no/such/folder", "dir_info": {"editable": True}}])
def test_the_name_where_nothing_else_is_known(origin: Any, recorded: Callable[[Any], None]) -> None:
    recorded(origin)
    assert install_command("jax") == "pip install 'gpt-xp[jax]'"


def test_gpt_xp_that_is_not_installed(recorded: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    recorded(None)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install_command("jax") == "pip install 'gpt-xp[jax]'"


def test_every_extra_in_a_hint_or_a_page_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.py")]:
        named |= set(find(r"'(?:gpt-xp|\.)\[([\w,-]+)\]'", file))
    for folder in ("gpt_xp", "backends"):
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(find(r"install_command\([\"']([\w-]+)[\"']\)", file))
    names = {name for each in named for name in each.split(",")}
    assert {"jax", "cuda13", "docs", "quantize", "strict"} <= names
    assert names <= set(extras)


def find(pattern: str, file: Path) -> list[str]:
    return re.findall(pattern, file.read_text(encoding="utf-8"))
