"""Compare gpt-xp's download with curl: the same file from the same local server, including the hash.

    python benchmarks/download.py --rate 125

gpt-xp and curl take turns (A B A B ...), each in its own process, and write to the same disk. The time of the transfer
does not include the start of Python. The time of the hash, which curl does not compute, is shown too. --rate limits the
server to that many MB/s, like a network. Without it, the loopback of this machine is measured.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = """
import sys, time
from pathlib import Path
from gpt_xp.hub.download import RemoteFile, download
from gpt_xp.hub.progress import StderrProgress
import requests
begin = time.perf_counter()
download(RemoteFile(sys.argv[1], "file"), Path(sys.argv[2]), StderrProgress())
print(time.perf_counter() - begin)
"""


def main() -> None:
    """Serve the file and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=548105171, help="size of the file (default: 124M's weights)")
    parser.add_argument("--rate", type=float, help="MB/s of the server (default: as fast as it can)")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("curl") is None:
        sys.exit("curl is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        write_random(path, options.bytes)
        server = serve(path, options.rate)
        url = f"http://127.0.0.1:{server.server_address[1]}/file"
        times: dict[str, list[float]] = {"curl": [], "gpt-xp": []}
        for _ in range(options.runs):
            times["curl"].append(curl(url, Path(folder, "curl")))
            times["gpt-xp"].append(gpt_xp(url, Path(folder, "gpt-xp")))
        server.shutdown()
    ratios = [mine / theirs for mine, theirs in zip(times["gpt-xp"], times["curl"], strict=True)]
    print(f"{options.bytes / 1e6:.0f} MB, server at {options.rate or 'any'} MB/s, {options.runs} runs, interleaved")
    for name, seconds in times.items():
        print(f"  {name:8} median {statistics.median(seconds):6.3f} s   {' '.join(f'{s:.3f}' for s in seconds)}")
    print(
        f"  ratio of the medians {statistics.median(times['gpt-xp']) / statistics.median(times['curl']):.3f}; of the ",
        end="",
    )
    print(f"pairs: median {statistics.median(ratios):.3f}   {' '.join(f'{r:.3f}' for r in ratios)}")


def write_random(path: Path, n_bytes: int) -> None:
    """Write a file that no disk or network can compress."""
    with path.open("wb") as file:
        while n_bytes:
            file.write(block := os.urandom(min(n_bytes, 1 << 24)))
            n_bytes -= len(block)


def serve(path: Path, rate: float | None) -> ThreadingHTTPServer:
    """Serve one file from a thread. The kernel copies it (sendfile), in small parts if the rate is limited."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = path.stat().st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", '"1"')
            self.end_headers()
            begin, sent = time.perf_counter(), 0
            with path.open("rb") as file:
                while sent < size:
                    sent += os.sendfile(self.connection.fileno(), file.fileno(), sent, 1 << (18 if rate else 24))
                    if rate:
                        time.sleep(max(0.0, begin + sent / (rate * 1e6) - time.perf_counter()))

        def log_message(self, format: str, *args: object) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def curl(url: str, target: Path) -> float:
    """Return curl's own time of the transfer."""
    command = ["curl", "--silent", "--output", str(target), "--write-out", "%{time_total}", url]
    seconds = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    target.unlink()
    return seconds


def gpt_xp(url: str, target: Path) -> float:
    """Return the time of `gpt_xp.hub.download.download`."""
    done = subprocess.run([sys.executable, "-c", CHILD, url, str(target)], capture_output=True, text=True, check=True)
    target.unlink()
    return float(done.stdout)


if __name__ == "__main__":
    main()
