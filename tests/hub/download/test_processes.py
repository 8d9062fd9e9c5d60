"""Processes that end while bytes come: the next one goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import PATIENCE
from downloads import CONTENT, PATH, fetch, part_of, pinned, posix, starts
from servers import FileServer, stall

# Downloads as a process of its own, which can be killed: URL, target, size, sha256.
CHILD = """
import sys
from pathlib import Path
from gpt_xp.hub.download import RemoteFile, download
from gpt_xp.errors import DownloadError
from gpt_xp.hub.progress import StderrProgress
url, target, n_bytes, digest, limit = sys.argv[1:]
if limit != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download(RemoteFile(url, "weights", int(n_bytes), digest), Path(target), StderrProgress())
except DownloadError as error:
    sys.exit(f"DownloadError: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


# --- processes that end ---------------------------------------------------------------------------------------------


def start_child(server: FileServer, target: Path, limit: int = 0) -> "subprocess.Popen[bytes]":
    wanted = pinned(server)
    args = (wanted.url, target, wanted.n_bytes, wanted.digest, limit)
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, args)], stderr=subprocess.PIPE)


def wait_for_part(target: Path, n_bytes: int) -> None:
    end = time.monotonic() + PATIENCE
    while not part_of(target).exists() or part_of(target).stat().st_size < n_bytes:
        assert time.monotonic() < end
        time.sleep(0.001)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_process_that_is_ended_leaves_what_has_come(server, target, number, code):
    server.faults[PATH] = [stall(40_009)]
    with start_child(server, target) as child:
        wait_for_part(target, 40_009)
        child.send_signal(number)
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == code
    assert b"Traceback" not in err
    assert not target.exists()
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]
    assert server.sent(PATH) == len(CONTENT)


@posix
def test_a_process_that_is_killed_while_bytes_come(server, target):
    server.rate = 200_000
    with start_child(server, target) as child:
        wait_for_part(target, 10_007)
        child.kill()
        child.communicate(timeout=PATIENCE)
    size = part_of(target).stat().st_size
    assert 10_007 <= size < len(CONTENT)
    server.rate = None
    fetch(pinned(server), target)
    first, second = server.requests
    assert second.start == size
    assert first.sent - size <= 20_011  # what was on its way, and no more


@posix
def test_a_limit_of_the_system(server, target):
    with start_child(server, target, limit=40_009) as child:
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1
    assert b"Traceback" not in err
    assert b"DownloadError: cannot write weights" in err
    assert b"File too large" in err
    assert not target.exists()
    server.forget()
    fetch(pinned(server), target)
    assert starts(server) == [40_009]
