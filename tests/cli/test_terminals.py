"""Terminals, pipes, full disks and Ctrl-C, with real processes."""

import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import PATIENCE, Terminal, posix, process, start

from gpt_xp.cli.output import waiting

# The bundled model is done before a signal can reach it.
SLOW = """
import sys, time
from gpt_xp.generation.decoder import Decoder
decode = Decoder.decode
def slow(*args):
    time.sleep(0.02)
    if not sys.stderr.isatty():
        print("a token", file=sys.stderr, flush=True)
    return decode(*args)
Decoder.decode = slow
from gpt_xp.cli import main
main()
"""
SLOW_COMMAND = [sys.executable, "-c", SLOW]
LONG = ("--max-tokens", "250", "--ignore-eos")

pytestmark = pytest.mark.usefixtures("no_variables")


@posix
def test_without_a_prompt_a_terminal_gets_the_help():
    for args, usage in (((), "gpt-xp [OPTIONS] [PROMPT]"), (("tokens",), "gpt-xp tokens [OPTIONS] [TEXT]")):
        terminal = Terminal(*args)
        assert terminal.end() == 0
        assert terminal.seen.startswith(f"Usage: {usage}")


@posix
def test_a_terminal_is_told_of_the_bundled_model_and_gets_the_same_text(shakespeare):
    told = "gpt-xp: using the bundled model shakespeare; `gpt-xp models pull 124M` gets GPT-2\n"
    text = shakespeare.generate("My lord", max_tokens=9).text + "\n"
    for args, expected in (([], told + text), (["--no-stream", "-m", "shakespeare"], text)):
        terminal = Terminal("My lord", "-n", "9", *args)
        assert terminal.end() == 0
        assert terminal.seen == expected


@posix
def test_a_terminal_gets_the_text_as_it_comes_and_ctrl_c_keeps_it(shakespeare):
    terminal = Terminal("A", "-m", "shakespeare", *LONG, command=SLOW_COMMAND)
    terminal.read(until=" ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    whole = shakespeare.generate("A", max_tokens=250, ignore_eos=True).text
    text = terminal.seen.removesuffix("\n\n")  # one of ours, one of click's
    assert len(text) > 1
    assert whole.startswith(text)
    assert text != whole


@posix
@pytest.mark.parametrize("samples", ["1", "2"])
def test_ctrl_c_keeps_the_text_that_a_pipe_has_not_seen_yet(shakespeare, samples):
    args = ("A", "--temperature", "1", "--seed", "5", "--num-samples", samples, *LONG)
    running = start(*args, command=SLOW_COMMAND)
    assert running.stderr is not None
    for _ in range(8):
        assert running.stderr.readline() == b"a token\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert b"Traceback" not in err
    whole = shakespeare.generate("A", temperature=1.0, seed=5, num_samples=2, max_tokens=250, ignore_eos=True)
    if samples == "1":
        assert len(out) > 5
        assert whole[0].text.startswith(out.decode().removesuffix("\n"))
    else:
        first, second = out.decode().removeprefix("--- sample 1 ---\n").split("\n--- sample 2 ---\n")
        assert whole[0].text.startswith(first)
        assert whole[1].text.startswith(second.removesuffix("\n"))


@posix
@pytest.mark.parametrize("wait", [0.02, 0.1, 0.3, 0.6])
def test_ctrl_c_while_jax_is_imported(wait):
    pytest.importorskip("jax")
    terminal = Terminal("A", "-b", "jax", *LONG, command=SLOW_COMMAND)
    terminal.read(until="bundled model")
    time.sleep(wait)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


# Modules that get a Ctrl-C while they are imported. The last one swallows it, as C code does that sees an error.
INTERRUPTED = {
    "raised": "import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass",
    "swallowed": """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    while True: pass
except KeyboardInterrupt:
    raise ImportError("numpy cannot be imported") from None
""",
}


@posix
@pytest.mark.parametrize(
    ("module", "how"), [("numpy", "raised"), ("numpy", "swallowed"), ("click", "raised"), ("threading", "raised")]
)
def test_ctrl_c_while_something_is_imported(tmp_path, module, how):
    (tmp_path / f"{module}.py").write_text(INTERRUPTED[how])
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gpt_xp.cli import main; main()"
    result = process(str(tmp_path), "A", command=[sys.executable, "-c", code])
    assert (result.code, result.out) == (130, "")
    assert result.err.strip() == ""


@posix
def test_ctrl_c_when_all_is_done(tmp_path):
    code = """
import atexit, os, signal
from gpt_xp.cli import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
main()
"""
    result = process("A", "-n", "1", command=[sys.executable, "-c", code])
    assert (result.code, result.err.strip()) == (130, "")


@posix
def test_behind_nohup_ctrl_c_stays_ignored(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    code = """
import os, signal, sys
from gpt_xp.cli import run
assert run() == 0
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    result = process(
        "A", "-n", "1", command=[sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert result.code == 0, result.err


@posix
def test_ctrl_c_in_a_callback_is_not_lost():
    code = """
import sys, time
from gpt_xp.cli.interrupts import resend_interrupt
sys.unraisablehook = resend_interrupt
class Callback:
    def __del__(self):
        raise KeyboardInterrupt
Callback()
try:
    for _ in range(200):
        time.sleep(0.1)
except KeyboardInterrupt:
    print("interrupted")
"""
    result = process(command=[sys.executable, "-c", code])
    assert result == (0, "interrupted\n", "")


@posix
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    for args in (("A",), ("--prompt-file", str(prompts), "--batch-size", "1"), ("backends",), ("tokens", "a")):
        running = start(*args)
        assert running.stdout is not None
        running.stdout.close()
        running.stdout = None
        _, err = running.communicate(timeout=PATIENCE)
        assert (running.returncode, err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("args", [("A",), ("A", "--json"), ("--help",)])
def test_a_full_disk_is_one_line(args):
    with open("/dev/full", "wb") as full:
        running = start(*args, stdout=full)
        _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert b"gpt-xp: error: cannot write to stdout: No space left on device" in err
    assert err.count(b"\n") == 1


@posix
def test_closed_streams():
    shell = ["sh", "-c", f'exec "{sys.executable}" -m gpt_xp "$@"']
    result = process("sh", command=[shell[0], shell[1], shell[2] + " <&-"])
    assert result == (1, "", "gpt-xp: error: stdin is closed: expected text\n")
    result = process("sh", "A", command=[shell[0], shell[1], shell[2] + " >&-"])
    assert result == (1, "", "gpt-xp: error: cannot write to stdout: it is closed\n")


def test_characters_that_stdout_lacks_become_question_marks():
    result = process("é ", "--echo", "-n", "1", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.code == 0
    assert result.out.startswith("? ")


@posix
def test_a_bar_shows_on_a_terminal_what_takes_more_than_a_second(tmp_path):
    with open(tmp_path / "out", "w+b") as out:
        terminal = Terminal("A", "-n", "70", "-m", "shakespeare", "--ignore-eos", command=SLOW_COMMAND, stdout=out)
        assert terminal.end() == 0
        assert "/70 [" in terminal.seen
        assert "token/s" in terminal.seen
        out.seek(0)
        assert b"token/s" not in out.read()


def test_waiting_is_shown_after_a_while(monkeypatch: pytest.MonkeyPatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for delay, is_shown in ((0.01, True), (60, False)):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with waiting("loading 124M", delay=delay):
            end = time.monotonic() + (PATIENCE if is_shown else 0.2)
            while not screen.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        assert ("loading 124M 00:00" in screen.getvalue()) is is_shown
