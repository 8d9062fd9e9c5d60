"""`gpt-xp bench`: its figures against hand-made turns, and who is measured, skipped or caught. No time is asserted."""

import dataclasses
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, children, posix, process, start
from folders import TESTS
from hypothesis import given
from hypothesis import strategies as st

from gpt_xp import SIZES
from gpt_xp.benchmark import plot, report
from gpt_xp.benchmark.driver import run_benchmark
from gpt_xp.benchmark.figures import Phase, Spread, Turn, Workload, WorkloadFigures, spread, turn_of, workload_figures
from gpt_xp.benchmark.models import bench, default_context, gpt_xp_spec
from gpt_xp.benchmark.process import ContenderProcess
from gpt_xp.benchmark.results import Benchmark, ContenderResult, ContenderSpec
from gpt_xp.errors import BackendError, CheckpointError, SettingError
from gpt_xp.reporting.text import wrapped

FAKE = TESTS / "support" / "fake_contender.py"

# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_turn_is_its_first_token_and_the_median_of_the_later_ones():
    assert turn_of([5.0, 0.1, 0.9, 0.2]) == Turn(5.0, 0.2)
    assert turn_of([5.0, 0.1, 0.9, 0.2, 0.4]) == Turn(5.0, pytest.approx(0.3))
    assert turn_of([5.0]) == Turn(5.0, None)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=11))
def test_a_spread_is_median_and_quartiles(numbers):
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
    assert spread(numbers) == Spread(*(pytest.approx(each) for each in (median, low, high)))


def test_ratios_are_taken_within_each_round():
    """The machine is ten times slower in the last round, for all; medians of seconds would say 1.5 and 3."""
    mine = [Turn(2.0, 0.2), Turn(3.0, 0.9), Turn(40.0, 4.0)]
    reference = [Turn(1.0, 0.1), Turn(2.0, 0.3), Turn(10.0, 1.0)]
    floor = [Turn(0.5, 0.1), Turn(1.0, 0.1), Turn(10.0, 0.5)]
    found = workload_figures(mine, Workload(30, 4, 5), reference, floor)
    assert found.prefill == Phase(Spread(3.0, 2.5, 21.5), 40.0, Spread(2.0, 1.75, 3.0), Spread(4.0, 3.5, 4.0))
    assert found.decode is not None
    assert found.decode.seconds == Spread(0.9, pytest.approx(0.55), pytest.approx(2.45))
    assert found.decode.tokens_per_second == pytest.approx(4 / 0.9)
    assert found.decode.ratio == Spread(pytest.approx(3.0), pytest.approx(2.5), pytest.approx(3.5))
    assert found.decode.floor_ratio == Spread(pytest.approx(8.0), pytest.approx(5.0), pytest.approx(8.5))


def test_there_may_be_nothing_to_compare_with_and_nothing_decoded():
    found = workload_figures([Turn(2.0, None)], Workload(30, 4, 1))
    assert found == WorkloadFigures(Phase(Spread(2.0, 2.0, 2.0), 60.0, None, None), None)


# --- a race of contenders that are made up ----------------------------------------------------------------------------

WORKLOADS = (Workload(5, 1, 4), Workload(7, 2, 2))
ROUNDS = 3
BEHAVIOURS = {
    "right": 1.0, "noise": 2.0, "slow to compile": 4.0, "floor": 0.5, "cuda": 3.0, "int8": 1.5, "wrong": 1.0,
    "nan": 1.0, "few": 1.0, "missing": 1.0, "no dtype": 1.0, "silent": 1.0, "dies": 1.0, "raises": 1.0,
    "short": 1.0,
}  # fmt: skip


def fake(behaviour: str, log: Path, scale: float = 1.0) -> ContenderSpec:
    command = (sys.executable, str(FAKE), behaviour, str(scale), str(log))
    return ContenderSpec(behaviour, command, is_floor=behaviour == "floor")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("race") / "log"


@pytest.fixture(scope="module")
def found(log: Path) -> Benchmark:
    specs = [fake(behaviour, log, scale) for behaviour, scale in BEHAVIOURS.items()]
    nowhere = ContenderSpec("nowhere", (str(log.parent / "no-such-program"),))
    return run_benchmark("made up", [*specs, nowhere], WORKLOADS, 97, rounds=ROUNDS, threads=2, pause=0)


def result_of(found: Benchmark, name: str) -> ContenderResult:
    return next(each for each in found.standings if each.name == name)


def test_figures_come_from_the_turns(found):
    """Runs 1 and 2 are the warm-up; the workloads have then runs 3, 5, 7 and 4, 6, 8."""
    for name, scale in (("right", 1.0), ("noise", 2.0), ("slow to compile", 4.0), ("floor", 0.5), ("int8", 1.5)):
        first, second = result_of(found, name).figures
        assert first.prefill.seconds == Spread(5 * scale, 4 * scale, 6 * scale)
        assert second.prefill.seconds == Spread(6 * scale, 5 * scale, 7 * scale)
        assert first.decode.seconds.median == pytest.approx(5 * scale * 3e-3)  # the median of 2, 3 and 7 thousandths
        assert second.decode.seconds.median == pytest.approx(6 * scale * 2e-3)  # only one token is decoded
        assert first.prefill.tokens_per_second == pytest.approx(5 / (5 * scale))
        assert second.decode.tokens_per_second == pytest.approx(2 / (6 * scale * 2e-3))
        for phase in (first.prefill, first.decode, second.prefill, second.decode):
            assert phase.ratio == Spread(*[pytest.approx(scale)] * 3)
            assert phase.floor_ratio == Spread(*[pytest.approx(scale / 0.5)] * 3)
        assert result_of(found, name).turns[0][2] == Turn(7 * scale, pytest.approx(7 * scale * 3e-3))


def test_the_floor_is_the_cpus(found):
    assert result_of(found, "cuda").figures[0].prefill.ratio.median == pytest.approx(3.0)
    assert result_of(found, "cuda").figures[0].prefill.floor_ratio is None


def test_everyone_has_a_turn_in_each_round_and_all_have_the_same_prompts(found, log):
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    turns = [(name, str(prompts), len(prompts), len(prompts[0]), n) for (name, _), prompts, n in runs]
    kept = ("right", "noise", "slow to compile", "floor", "cuda", "int8")
    timed = [turn for turn in turns if turn[0] in kept][2 * len(kept) :]
    assert len(timed) == len(kept) * ROUNDS * 2
    places = list(BEHAVIOURS)
    for turn, begin in enumerate(range(0, len(timed), len(kept))):
        together = timed[begin : begin + len(kept)]
        number, workload = turn // 2, WORKLOADS[turn % 2]
        rotated = [name for name in places[number:] + places[:number] if name in kept]
        assert [name for name, *_ in together] == rotated
        assert {each[2:] for each in together} == {(workload.batch, workload.context, workload.n_new)}
        assert len({prompts for _, prompts, *_ in together}) == 1
    assert len({prompts for _, prompts, *_ in timed}) == ROUNDS * 2
    assert all(0 <= token < 97 for _, prompts, _ in runs for row in prompts for token in row)


def test_what_libraries_write_does_not_disturb(found):
    assert result_of(found, "noise").failed is None
    assert result_of(found, "noise").description["settings"] == {"behaviour": "noise"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "its logits differ from those of right by 1.0e-02 of the largest (allowed: 2e-05)"),
        ("nan", "its logits differ from those of right by inf of the largest (allowed: 2e-05)"),
        ("few", "it has 96 logits, where right has 97"),
        ("dies", "their_library: out of luck"),
        ("raises", "ValueError: first line second line"),
        ("short", "it has timed 3 tokens, and not 4"),
    ],
)
def test_what_goes_wrong_is_said_and_the_others_go_on(found, name, reason):
    assert result_of(found, name).failed == reason
    assert result_of(found, name).figures == result_of(found, name).turns == ()
    assert not found.is_ok
    assert len(result_of(found, "right").turns[1]) == ROUNDS


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "ModuleNotFoundError: No module named 'their_library'"),
        ("no dtype", "it does not tell its dtype"),
        ("silent", "it ended with 0"),
    ],
)
def test_who_cannot_begin_is_skipped(found, name, reason):
    assert (result_of(found, name).skipped, result_of(found, name).failed) == (reason, None)
    assert result_of(found, name).figures == ()


def test_a_program_that_is_not_there(found):
    assert result_of(found, "nowhere").skipped.endswith("no-such-program cannot be run: No such file or directory")


def test_the_logits_of_quantized_weights_are_reported(found):
    assert result_of(found, "int8").failed is None
    assert result_of(found, "int8").logits_difference == pytest.approx(0.01, rel=1e-3)
    assert result_of(found, "noise").logits_difference == 0.0
    assert result_of(found, "right").logits_difference is None
    assert result_of(found, "floor").logits_difference is None


@pytest.mark.parametrize(("allowed", "fits"), [(0.02, True), (0.005, False)])
@pytest.mark.parametrize("behaviour", ["int8", "wrong"])
def test_an_entry_says_how_far_its_logits_may_be_off(tmp_path, behaviour, allowed, fits):
    log = tmp_path / "log"
    specs = [fake("right", log), dataclasses.replace(fake(behaviour, log), allowed=allowed)]
    found = run_benchmark("made up", specs, [Workload(5)], 97, rounds=1, pause=0)
    assert found.is_ok == fits
    assert bool(result_of(found, behaviour).figures) == fits


def test_compiling_counts_in_the_warm_up_alone(found):
    assert result_of(found, "slow to compile").compile_seconds == 20.0
    assert result_of(found, "slow to compile").peak_memory_bytes == 12345
    assert result_of(found, "right").compile_seconds is None
    assert result_of(found, "right").peak_memory_bytes > 1e6  # of the process


def test_the_cores_that_a_contender_had(found):
    cores = result_of(found, "right").cores
    assert 0 < cores < 1000
    assert report.as_text(found).count(f" {report.number(cores)}\n") >= 1


def test_the_reference_is_who_is_named(log):
    names = [fake("right", log), fake("noise", log, 2.0)]
    named = run_benchmark("made up", names, [Workload(5)], 97, rounds=1, reference="noise", pause=0)
    assert named.reference == "noise"
    assert result_of(named, "right").figures[0].prefill.ratio.median == 0.5
    assert named.is_ok
    nobody = run_benchmark("made up", [fake("missing", log)], [Workload(5)], 97, rounds=1, pause=0)
    assert (nobody.reference, nobody.is_ok) == (None, False)
    for wrong in ({"specs": []}, {"workloads": []}, {"rounds": 0}):
        with pytest.raises(SettingError, match="needs a contender, a workload and a round"):
            run_benchmark(**{"title": "", "specs": names, "workloads": [Workload(5)], "n_vocab": 97, **wrong})
    with pytest.raises(SettingError, match="there is no contender 'nosie' for ratios; there are: right, noise"):
        run_benchmark("made up", names, [Workload(5)], 97, reference="nosie")


def test_who_does_not_answer_is_ended(log):
    worker = ContenderProcess(fake("right", log).command, {})
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    assert worker._process.returncode == -signal.SIGKILL


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_everything_in_80_columns(found):
    text = report.as_text(found)
    assert max(map(len, text.splitlines())) <= 80
    assert f"made up, {ROUNDS} rounds, threads 2; 20" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["noise", "5", "10000", "±20%", "0.50", "2.00", "2.00-2.00", "4.00", "4.00-4.00"] in rows
    assert ["right", "2", "x", "7", "12.0", "±17%", "167", "-", "2.00", "2.00-2.00"] in rows
    assert ["cuda", "5", "15000", "±20%", "0.33", "3.00", "3.00-3.00", "-"] in rows
    assert ["int8", "cpu", "1.0", "1.0e-02", "-"] in [row[:5] for row in rows]
    assert "raises: FAILED: ValueError: first line second line" in text
    assert "missing: skipped, ModuleNotFoundError: No module named 'their_library'" in text
    assert "noise: behaviour noise" in text


def test_a_command_to_copy_stays_on_one_line():
    for command in (
        "pip install 'gpt-xp[quantize]'",
        "pip install -e '/my folder[jax]'",
        "`gpt-xp models pull 124M`",
        "pip install -e .",
    ):
        for n in range(40, 80):
            text = wrapped(f"{'x' * (n // 2)} {'y' * (n - n // 2)} it-is-not-installed: {command} and more words")
            assert command in text
            assert all(len(line) <= 80 or command in line for line in text.splitlines())
    assert "array-api-strict" in wrapped("word " * 15 + "array-api-strict")


def test_where_nothing_can_be_measured_no_turn_is_taken(tmp_path):
    log = tmp_path / "log"
    began = run_benchmark("made up", [fake("missing", log), fake("floor", log)], [Workload(5)], 97, pause=0)
    assert not began.is_ok
    assert began.reference is None
    assert not any(each.figures for each in began.standings)
    assert not log.exists() or "floor" not in log.read_text(), "the floor has run for nobody"
    for text in (report.as_text(began), report.as_markdown(began)):
        assert "None" not in text
        assert "missing: skipped, ModuleNotFoundError" in text


def test_the_report_in_markdown(found):
    text = report.as_markdown(found)
    assert "| decode | tokens | ms | tokens/s | x right | x floor |\n| --- | --- | --- | --- | --- | --- |\n" in text
    assert "| noise | 5 | 30.0 ±20% | 33.3 | 2.00 2.00-2.00 | 4.00 4.00-4.00 |\n" in text


def test_json_holds_all_of_it(found):
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content["is_ok"] is False
    nan, right = (next(each for each in content["standings"] if each["name"] == name) for name in ("nan", "right"))
    assert nan["logits_difference"] is None
    assert right["figures"][0]["decode"]["seconds"]["median"] == pytest.approx(0.015)
    assert right["turns"][1][0] == {"prefill": 4.0, "decode": 0.008}
    assert content["workloads"][1] == {"context": 7, "batch": 2, "n_new": 2}
    assert content["threads"] == 2
    assert {"cpu", "cores", "memory_bytes", "python", "numpy", "gpt_xp", "date"} <= content["environment"].keys()


def test_a_plot_is_whole_or_not_there(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    swept = (Workload(5, 1, 4), Workload(5, 2, 2))
    for each in (dataclasses.replace(found, workloads=swept), dataclasses.replace(found, workloads=swept[:1])):
        plot.save_plot(each, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    def fail(*args: object, **settings: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(CheckpointError, match=r"out\.png \(no space left"):
        plot.save_plot(found, tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# --- a benchmark of a model -------------------------------------------------------------------------------------------


def test_prompts_suit_the_models_context():
    assert default_context(SIZES["124M"].n_ctx) == [16, 128, 512]
    assert default_context(256) == [4, 32, 128]
    assert default_context(5) == [1, 2]


def test_what_cannot_be_measured_is_said_at_once(monkeypatch):
    monkeypatch.setattr(
        "gpt_xp.benchmark.models.run_benchmark", lambda *arguments, **settings: pytest.fail("it has begun")
    )
    for arguments, error, message in (
        ({"backends": ["nump"]}, BackendError, "there is no backend 'nump'; there are: numpy"),
        ({"backends": ["numpy+int5"]}, SettingError, "quantize must be one of int8, int4"),
        ({"backends": []}, SettingError, "no backend was named"),
        ({"dtypes": []}, SettingError, "no dtype was named"),
        ({"batch": []}, SettingError, "no batch was named"),
        ({"dtypes": ["float8"]}, SettingError, "there is no dtype 'float8'"),
        (
            {"context": [16, 250]},
            SettingError,
            "max_tokens 16 after 250 tokens of a prompt",
        ),
        ({"context": [242]}, SettingError, "max_tokens 16 after 242 tokens"),
        ({"context": [300], "max_tokens": None}, SettingError, "does not fit the model, which takes 256"),
        ({"context": [0]}, SettingError, "at least one token"),
        ({"batch": [1, 0]}, SettingError, "at least one row"),
        ({"rounds": 0}, SettingError, "at least one round"),
        ({"max_tokens": 0}, SettingError, "max_tokens must be at least 1, not 0"),
    ):
        with pytest.raises(error, match=message):
            bench(**{"backends": ["numpy"], "model": "shakespeare", "max_tokens": 16, **arguments})  # type: ignore[arg-type]


def test_workloads_are_all_combinations(monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "gpt_xp.benchmark.models.run_benchmark", lambda *arguments, **settings: seen.update(all=arguments)
    )
    bench(["numpy", "jax@cpu"], "shakespeare", dtypes=["float32", "float64"], context=[7, 251, 7], batch=[1, 3])
    title, specs, workloads, n_vocab = seen["all"]
    assert (title, n_vocab) == ("shakespeare", 1024)
    assert workloads == [Workload(context, batch, 6) for batch in (1, 3) for context in (7, 251)]
    names = ["numpy float32", "numpy float64", "jax@cpu float32", "jax@cpu float64", "floor"]
    assert [spec.name for spec in specs] == names
    assert json.loads(specs[3].command[-1])["device"] == "cpu"
    job = json.loads(gpt_xp_spec("here", "torch+int8@cuda:1").command[-1])
    assert (job["model"], job["backend"], job["quantize"], job["device"]) == ("here", "torch", "int8", "cuda:1")


def test_all_that_are_here_are_measured_and_ratios_are_to_numpy(monkeypatch):
    monkeypatch.setattr(
        "gpt_xp.benchmark.models.usable_backends", lambda: ["torch", "array-api-strict", "numpy", "jax"]
    )
    seen: list[ContenderSpec] = []
    monkeypatch.setattr(
        "gpt_xp.benchmark.models.run_benchmark", lambda title, specs, *others, **settings: seen.extend(specs)
    )
    bench(model="shakespeare")
    assert [spec.name for spec in seen] == ["numpy float32", "jax float32", "torch float32", "floor"]


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ("bench", "-m", "shakespeare", "--rounds", "1", "-n", "3", "--context", "5", "--batch", "2")
    result = process(
        *command, "--backends", "numpy,numpy@cuda:0", "--dtypes", "float32,float64", "--threads", "1", "--json",
        "--plot", str(tmp_path / "out.svg"),
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.svg"]
    content = json.loads(result.out)
    assert (content["schema"], content["is_ok"], content["threads"]) == (2, True, 1)
    assert content["workloads"] == [{"context": 5, "batch": 2, "n_new": 3}]
    single, double, cuda, _, floor = content["standings"]
    assert (single["description"]["settings"]["threads"], floor["is_floor"]) == ("1", True)
    assert 0 < double["logits_difference"] < 2e-5
    assert double["figures"][0]["decode"]["ratio"]["median"] > 0
    assert "numpy has no device 'cuda:0'" in cuda["skipped"]


def test_wrong_usage():
    for arguments, code, message in (
        (("--context", "16,x"), 2, "'x' is not a valid integer"),
        (("--batch", "0"), 2, "0 is not in the range"),
    ):
        result = process("bench", "-m", "shakespeare", *arguments)
        assert (result.code, result.out) == (code, "")
        assert message in result.err


def test_a_plot_that_cannot_be_written_is_an_error_before_anything_runs():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = process("bench", "-m", "shakespeare", "--plot", "no-such-directory/out.png")
    assert (result.code, result.out) == (1, "")
    assert "a plot cannot be written to no-such-directory/out.png" in result.err


@posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_leaves_no_process_behind(tmp_path, monkeypatch, how):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = start("bench", "-m", "shakespeare", "--backends", "numpy", "--rounds", "1000")
    end = time.monotonic() + PATIENCE
    while len(workers := children(running.pid)) < 2 and time.monotonic() < end:
        assert running.poll() is None, "it has ended before its time"
        time.sleep(0.01)
    assert len(workers) == 2
    time.sleep(0.4)
    running.send_signal(how)
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == (130 if how == signal.SIGINT else -how)
    assert out == b""
    assert b"Traceback" not in err
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(tmp_path.iterdir()) == []
