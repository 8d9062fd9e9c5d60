"""Servers and folders for the tests of downloads."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from downloads import BUCKET, CONFIG, CONTENT, PATH, WEIGHTS
from servers import BucketServer, FileServer, HubServer

import gpt_xp.hub.download as module


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds waited between tries, which take no time here."""
    waits: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    return waits


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "NETRC":
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({PATH: CONTENT}) as server:
        yield server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({WEIGHTS: CONTENT, CONFIG: b'{"n_layer": 2}'}) as hub:
        yield hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights"


@pytest.fixture
def bucket() -> Iterator[BucketServer]:
    with BucketServer({BUCKET: CONTENT}) as bucket:
        yield bucket
