"""Files take the place of files alone."""

import os
import stat
from pathlib import Path

import pytest

from gpt_xp.atomic_files import check_place, written_aside
from gpt_xp.errors import CheckpointError, SettingError


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Return a named pipe: as a device is, it is neither a file nor a directory."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(pipe: Path) -> None:
    with pytest.raises(SettingError, match=r"a page cannot be written to .*pipe: it is no regular file"):
        check_place(pipe, "a page")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*pipe: it is no regular file"),
        written_aside(pipe, 5) as aside,
    ):
        Path(aside).write_text("12345")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(pipe.parent.iterdir()) == [pipe]


def test_a_link_is_replaced_by_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("before")
    check_place(tmp_path / "link", "a page")
    with written_aside(tmp_path / "link", 5) as aside:
        Path(aside).write_text("after")
    assert (tmp_path / "link").read_text() == "after"
