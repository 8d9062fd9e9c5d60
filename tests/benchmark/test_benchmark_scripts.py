"""The arithmetic of the scripts in `benchmarks/`; what they measure is not tested, for it takes long."""

import argparse
import datetime
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Result, in_a_new_process, posix, process
from folders import BENCHMARKS
from naive_gpt2 import gpt2 as oracle
from small_models import CONFIGS, small_params
from third_party import installed

import gpt_xp
from gpt_xp.benchmark.figures import Spread, Turn, Workload, workload_figures
from gpt_xp.benchmark.results import Benchmark, ContenderResult, ContenderSpec
from gpt_xp.comparison.figures import ComparisonFigures, Difference, LayerFigures, LogitFigures
from gpt_xp.comparison.results import BackendResult
from gpt_xp.errors import BackendError, GptXpError
from gpt_xp.tolerances import TOLERANCE

SCRIPTS = BENCHMARKS
OPTIONS = argparse.Namespace(size="124M", markdown=False)


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement_run(script, backend, *logits, dtype="float32"):
    return script("agreement").Run(BackendResult(backend, dtype, "cpu", "1"), logits)


def test_each_pair_of_libraries_has_the_largest_difference_of_all_prompts(script):
    a, b = np.float32([[1, 2]]), np.float32([[4, -8]])
    runs = [
        agreement_run(script, "numpy", a, b),
        agreement_run(script, "jax", a, b),
        agreement_run(script, "torch", a, b + 2),
    ]
    assert list(script("agreement").pairs("float32", runs)) == [
        ("float32", "numpy", "jax"),
        ("jax", "the same bits", ""),
        ("torch", "2.5e-01", "2.5e-01"),  # 2 of 8
    ]


def test_the_page_has_the_figures_of_compare_for_each_library_and_dtype():
    command = [sys.executable, str(SCRIPTS / "agreement.py"), "--quick", "--backends", "array-api-strict,numpy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    found = gpt_xp.compare("numpy", "shakespeare", "ROMEO:", dtypes=["float32", "float64"], max_tokens=4)
    for run in found.runs:
        error = run.figures.logits.difference.relative
        expected = ["numpy", np.__version__, "cpu", run.dtype, f"{error:.1e}" if error else "0"]
        [line] = [line for line in lines if line[:5] == expected]
        assert line[-2:] == ["4 of 4", "1 of 1"]
    assert ["numpy", "the same bits"] in lines, "array-api-strict computes with NumPy"
    assert "bfloat16" not in done.stdout, "neither of them computes in it"
    assert f"on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}" in done.stdout
    assert "No GPU has run yet" in done.stdout


def test_with_a_gpu_each_library_also_runs_with_tf32(script, monkeypatch):
    names = ["numpy", "jax", "jax-tf32", "torch", "torch-tf32", "cupy", "cupy-tf32", "mlx"]
    infos = [SimpleNamespace(name=name, problem=None) for name in names]
    monkeypatch.setattr(gpt_xp, "backends", lambda: [*infos, SimpleNamespace(name="dask", problem="not installed")])
    assert script("agreement").installed(has_cuda=False) == ["numpy", "jax", "torch", "cupy", "mlx"]
    assert script("agreement").installed(has_cuda=True) == [
        "numpy", "jax@cpu", "torch@cpu", "mlx",
        "cupy", "jax@gpu", "torch@cuda", "cupy-tf32", "jax-tf32@gpu", "torch-tf32@cuda",
    ]  # fmt: skip


def test_a_run_whose_logits_are_not_finite_has_a_row(script):
    """Such a run generates nothing."""
    infinite = Difference(np.inf, np.inf, np.inf)
    figures = ComparisonFigures(
        (LayerFigures("embedding", infinite, 1e-3),), LogitFigures(infinite, np.inf, np.inf, 0.0, ())
    )
    run = script("agreement").Run(BackendResult("mlx", "float16", "gpu", "1", figures=figures), ())
    assert script("agreement").row(run) == (
        "mlx", "1", "gpu", "float16", "inf", "inf", "embedding (inf)", "-", "-",
    )  # fmt: skip


def test_weights_of_trained_size_have_large_activations(script):
    config = gpt_xp.GPT2Config(n_vocab=101, n_ctx=37, n_embd=456, n_head=3, n_layer=3)
    params = script("shapes").trained_size_params(config)
    found = gpt_xp.trace(params, np.arange(37), config, ["blocks.*.hook_resid_post", "logits"])
    assert 2000 < np.abs(found["blocks.0.hook_resid_post"]).max() < 4000
    assert 2000 < np.abs(found["blocks.1.hook_resid_post"]).max() < 4000
    assert np.abs(found["blocks.2.hook_resid_post"]).max() < 1000
    assert 5 < np.abs(found["logits"]).max() < 500


def test_a_library_with_tf32_computes(script):
    """It is found where its folder is on PYTHONPATH. On a CPU the numbers are those of the library itself."""
    with pytest.raises(BackendError, match="there is no backend 'jax-tf32'"):
        gpt_xp.get_backend("jax-tf32")
    code = """
import json, gpt_xp
model = gpt_xp.load("shakespeare", backend="jax-tf32")
print(json.dumps([model.generate("ROMEO:", max_tokens=9).token_ids, model.backend.name]))
"""
    ids, name = in_a_new_process(code, **installed(SCRIPTS / "tf32"))
    assert name == "jax-tf32"
    assert ids == gpt_xp.load("shakespeare", backend="numpy").generate("ROMEO:", max_tokens=9).token_ids


def benchmark(workloads, turns, floor=None):
    """A benchmark in which each name has the turns given for each workload."""
    standings = []
    for name, own in turns.items():
        found = tuple(workload_figures(each, workload) for each, workload in zip(own, workloads, strict=True))
        standings.append(ContenderResult(name, name == floor, figures=found, turns=tuple(map(tuple, own))))
    return Benchmark("a test", tuple(workloads), 2, 2, None, tuple(standings), {})


def test_naive_contender_computes_gpt2(script):
    config, params = CONFIGS["planted"], small_params("planted")
    tokens = np.random.default_rng(3).integers(0, config.n_vocab, 7).tolist()
    wanted = oracle(tokens, **params, n_head=config.n_head)
    naive = script("contenders.naive")
    found = naive.all_logits(tokens, **naive.copied(params), n_head=config.n_head)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= TOLERANCE["logits", "float32"] * np.abs(wanted).max()


def test_target_is_met_where_the_interval_reaches_it(script):
    verdict = script("common").verdict
    assert verdict(Spread(1.05, 0.99, 1.10), 1.0) == "<= 1 x: met"
    assert verdict(Spread(1.05, 1.01, 1.10), 1.0) == "<= 1 x: not met"
    assert verdict(Spread(3.9, 3.5, 4.1), 4, at_least=True) == ">= 4 x: met"
    assert verdict(Spread(3.9, 3.5, 3.95), 4, at_least=True) == ">= 4 x: not met"


def test_ratios_are_taken_within_a_round(script):
    # The second round is ten times as slow for both: a ratio of medians would not be 2 and 3.
    assert script("common").ratio([2.0, 30.0], [1.0, 10.0]) == Spread(2.5, 2.25, 2.75)


def test_growth_is_what_the_extra_bytes_take_at_the_floors_bandwidth(script):
    decode = script("decode")
    weights, each = decode.token_bytes(OPTIONS)
    # The token table; 12 layers of 12 x 768^2 weights and 13 x 768 biases and scales; and the last norm.
    assert weights == 4 * (50257 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768)
    assert each == 12 * 2 * 768 * 4
    speed = 50e9
    floor = [[Turn(1.0, (weights + each * context) / speed)] * 2 for context in (16, 64, 960)]
    extra = each * (960 - 64) / speed
    ours = [[Turn(1.0, 0.01)] * 2, [Turn(1.0, 0.02)] * 2, [Turn(1.0, 0.02 + 2 * extra)] * 2]
    workloads = [Workload(context) for context in (16, 64, 960)]
    [table] = decode.growth(benchmark(workloads, {"ours": ours, "floor": floor}, "floor"), OPTIONS)
    rows = {line.split("  ")[0]: line.split()[-2] for line in table.splitlines()[1:]}
    assert rows == {"ours": "2.00", "floor": "1.00", "the cache's extra 66.1 MB at 50.0 GB/s": "1.00"}


def test_gain_of_a_batch_is_in_tokens_per_second(script):
    turns = {"ours": [[Turn(1.0, 0.010)] * 2, [Turn(1.0, 0.016)] * 2]}
    found = benchmark([Workload(64), Workload(64, batch=8)], turns)
    assert script("batch").gain(found.standings[0], 0, 1, 8).median == pytest.approx(5)


def test_naive_is_compared_over_its_whole_command(script):
    peers = script("peers")
    turns = {
        "gpt-xp numpy": [[Turn(0.1, 0.01)], [Turn(0.5, 0.02)]],
        peers.NAIVE: [[Turn(0.2, 0.12)], [Turn(2.0, 1.9)]],
    }
    command, token = peers.naive_ratios(benchmark([peers.README_COMMAND, peers.AT_512], turns))
    assert command[1].startswith(f"{(0.2 + 39 * 0.12) / (0.1 + 39 * 0.01):.3f} ")
    assert token[1].startswith("95.000 ")


TINY = ["--n-layer", "1", "--n-head", "3", "--n-embd", "33", "--n-ctx", "17", "--n-vocab", "307", "--batch", "4"]


@pytest.mark.oracle
def test_all_trainers_compute_the_same_losses(script):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev,oracle]'")
    train = script("train")
    names = ["gpt-xp", "transformers", "nanoGPT's recipe", "gpt-xp, 4 pieces", "floor"]
    options = train.parser().parse_args([*TINY, "--rounds", "2", "--steps", "1", "--threads", "1", "--only", *names])
    with train.checkpoint(options) as folder:
        trainers = train.take_turns(folder, options)
    assert [trainer.name for trainer in trainers] == names
    assert all(len(trainer.seconds) == 2 for trainer in trainers)
    for trainer in trainers[:4]:  # independent of gpt-xp, the second and the third know what is right
        assert trainer.losses == pytest.approx(trainers[1].losses, abs=1e-5)
        assert trainer.losses[0] == pytest.approx(np.log(307), abs=0.1)


def test_trainers_that_disagree_or_learn_nothing_are_not_timed(script):
    train = script("train")

    def trainer(name, *losses):
        return train.TimedTrainer(name, None, losses=[*losses])

    train.check_losses([trainer("floor", None), trainer("a", 6.0, 5.0), trainer("b", 6.00005, 5.0)])
    for losses in ((6.0, 5.001), (6.0, float("nan"))):
        with pytest.raises(GptXpError, match="b does not train as a does"):
            train.check_losses([trainer("a", 6.0, 5.0), trainer("b", *losses)])
    with pytest.raises(GptXpError, match="a does not learn"):
        train.check_losses([trainer("a", 6.0, 6.0)])


def test_training_ratios_are_of_tokens_per_second_within_a_round(script):
    train = script("train")
    seconds = {"gpt-xp": [0.1, 1.0], "transformers": [0.2, 3.0]}
    trainers = [train.TimedTrainer(name, None, "", [5.0], each, [7.0, 9.0]) for name, each in seconds.items()]
    head, ours, theirs = train.rows(trainers, 4096)
    assert head[2:5] == ("tokens/s", "x gpt-xp", "x transformers")
    assert ours[2:5] == ("7447", "-", "2.50 2.25-2.75")
    assert theirs[3].startswith("0.42 ")


def test_training_floor_is_all_products_of_a_step(script):
    floor = script("training.floor")
    config, batch = CONFIGS["prime"], 3
    shapes = [*floor.block_products(config, batch)] * config.n_layer + [*floor.last_product(config, batch)]
    n_flops = sum(3 * 2 * np.prod(x) * w[-1] for x, w in shapes)
    # Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T for each token.
    n_weights = config.n_layer * 12 * config.n_embd**2 + config.n_vocab * config.n_embd
    per_token = 6 * n_weights + 12 * config.n_layer * config.n_embd * config.n_ctx
    assert n_flops == per_token * batch * config.n_ctx


def test_the_parts_of_a_training_step_compute(script):
    for name in ("jax", "optax"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")
    shape = argparse.Namespace(n_layer=1, n_head=3, n_embd=12, n_ctx=7, n_vocab=277)
    with script("train").checkpoint(shape) as folder:
        parts = {part.name: part for part in script("training.parts").make(folder, batch=2)}
    attended, gradients = parts["- attention"].work()
    assert attended.shape == (2, 3, 7, 4)
    assert [each.shape for each in gradients] == [attended.shape] * 3
    assert np.isfinite(attended).all()


def test_a_checkout_is_measured_with_its_own_code(script, tmp_path):
    before_after, entry = script("before_after"), ContenderSpec("before", ["python", "-m", "gpt_xp"])
    root = SCRIPTS.parent
    command = before_after.in_checkout(root, entry).command
    assert command[:2] == ("env", f"PYTHONPATH={root}:{root / 'backends'}")
    assert command[-3:] == ("python", "-m", "gpt_xp")
    with pytest.raises(GptXpError, match=f"{tmp_path} is no checkout of gpt-xp"):
        before_after.in_checkout(tmp_path, entry)


def test_processes_are_compared_by_their_medians(script):
    before_after, workload = script("before_after"), Workload(23)

    def run(before, after):
        turns = {"before": before, "after": after}
        standings = tuple(
            ContenderResult(
                name, figures=(workload_figures(each, workload),) if each else (), turns=(tuple(each),) if each else ()
            )
            for name, each in turns.items()
        )
        return Benchmark("", (workload,), 3, 2, "before", standings, {})

    def turns(*milliseconds):
        return [Turn(7 * each / 1e3, each / 1e3) for each in milliseconds]

    runs = [run(turns(2, 4, 9), turns(5, 6, 1)), run(turns(8, 8), turns(4, 4)), run(turns(1), turns(3))]
    table = before_after.over_processes("numpy", [*runs, run(turns(1), [])], argparse.Namespace(markdown=True))
    head, _, prefill, decode = [[each.strip() for each in line.split("|")[1:-1]] for line in table.splitlines()]
    assert head[0] == "numpy, 3 processes"
    assert prefill == ["prefill", "1", "23", "28.0", "28.0", "1.25 0.88-2.12"]
    assert decode == ["decode", "1", "23", "4.0", "4.0", "1.25 0.88-2.12"]


def test_the_model_of_the_scripts_can_be_loaded(script, tmp_path, monkeypatch):
    config = gpt_xp.GPT2Config(n_vocab=1024, n_ctx=37, n_embd=12, n_head=3, n_layer=2)
    monkeypatch.setitem(gpt_xp.SIZES, "small", config)
    script("load").make(tmp_path, "small")
    made = gpt_xp.load(tmp_path, backend="numpy")
    assert (made.config.n_layer, made.tokenizer.n_vocab) == (2, 1024)
    assert np.isfinite(made.logits([1, 50, 3])).all()


def test_an_unknown_peer_is_refused_by_name(script, tmp_path):
    with pytest.raises(GptXpError, match=r"no 'lama.cpp' .* transformers, .*llama.cpp Q8_0,"):
        script("common").peers(tmp_path, ["llama.cpp F32", "lama.cpp"], OPTIONS)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


STAND_IN = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
*gpu_smoke*) echo "a check that FAILED" && exit 3 ;;
*pytest*) echo "a test that hangs" && exec sleep 60 ;;
esac
echo "figures of $1"
"""
PYTHON3 = """#!/bin/sh
echo "python3 $*" >> {log}
mkdir -p .venv-gpu/bin
cp {python} .venv-gpu/bin/python
printf '#!/bin/sh\\necho "pip $*" >> {log}\\ncp {python} .venv-gpu/bin/gpt-xp\\n' > .venv-gpu/bin/pip
chmod +x .venv-gpu/bin/pip
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
*name*) echo "NVIDIA H100 80GB HBM3" ;;
*) echo "| NVIDIA-SMI 580.82   Driver Version: 580.82   CUDA Version: {cuda}     |" ;;
esac
"""


class Gpu:
    """A copy of `gpu.sh` on a machine whose GPU and Python are scripts; `ran` has the arguments of each call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.bin = folder, folder / "log", folder / "bin"
        (folder / "benchmarks").mkdir()
        shutil.copy(SCRIPTS / "gpu.sh", folder / "benchmarks")
        self.python = self.script("interpreter", STAND_IN)
        self.script("python3", PYTHON3, python=self.python)
        self.script("nvidia-smi", NVIDIA_SMI, cuda="13.0")

    def script(self, name: str, text: str, **values: Any) -> Path:
        self.bin.mkdir(exist_ok=True)
        path = self.bin / name
        path.write_text(re.sub(r"\{(\w+)\}", lambda found: str((values | {"log": self.log})[found[1]]), text))
        path.chmod(0o755)
        return path

    def __call__(self, *parts: str, **changes: Any) -> Result:
        variables = {"PYTHON": self.python, "OUT": self.folder / "out", "LIMIT": "60"} | changes
        environment = {name: str(value) for name, value in variables.items() if value is not None}
        command = ["sh", str(self.folder / "benchmarks" / "gpu.sh")]
        return process(*parts, command=command, env=environment | {"PATH": f"{self.bin}:{os.environ['PATH']}"})

    @property
    def ran(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def result(self) -> str:
        return (self.folder / "out" / "gpu-NVIDIA-H100-80GB-HBM3.md").read_text()


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


@posix
def test_a_part_that_fails_or_hangs_is_reported_and_the_next_is_run(gpu: Gpu):
    done = gpu("smoke", "tests", "compare", LIMIT=2)
    assert done.code == 1
    assert done.out.splitlines()[-1] == "FAILED: smoke tests "
    assert done.out.startswith(gpu.result[gpu.result.index("\n## smoke") :]), "what is shown is what is kept"
    assert re.findall("^## (.*)", gpu.result, re.MULTILINE) == ["smoke", "tests", "compare"]
    smoke, tests, compare = re.split("^## ", gpu.result, flags=re.MULTILINE)[1:]
    assert "a check that FAILED" in smoke
    assert "FAILED with exit code 3: " in smoke
    assert "a test that hangs" in tests
    assert "ENDED after 2 seconds: tests" in tests
    assert "figures of -m" in compare
    assert gpu.result.count("```") % 2 == 0


@posix
def test_results_are_appended(gpu: Gpu):
    assert gpu("compare").code == 0
    before = gpu.result
    assert gpu("124M").code == 0
    assert gpu.result.startswith(before)
    assert gpu.result.count("# On an ") == 1
    assert "FAILED" not in gpu.result


@posix
def test_all_parts_are_run_in_order_and_each_checkpoint_is_written_once(gpu: Gpu):
    assert gpu(LIMIT=2).code == 1
    scripts = [re.sub(r"^benchmarks/|^-m (\w+).*", r"\1", line).split()[0] for line in gpu.ran]
    sized = ["bandwidth.py", "gpu_products.py", "cuda_graph.py", "peers.py"]
    assert scripts == ["gpu_smoke.py", "pytest", "gpt_xp", *sized, *sized]
    for size in ("124M", "1558M"):
        lines = [line for line in gpu.ran if f"--size {size}" in line]
        folders = [line.split("--folder ")[1].split()[0] for line in lines if "--folder" in line]
        assert len(folders) == 2
        assert len(set(folders)) == 1
        assert not Path(folders[0]).exists()
    # What README offers for CuPy, and in float16 too.
    peers = [line for line in gpu.ran if "peers.py" in line]
    assert ["bfloat16" in re.findall(r"--dtypes (\S+)", line)[0] for line in peers] == [False, False]
    assert "--dtypes float32,float16" in peers[0]


@posix
@pytest.mark.parametrize(("driver", "cuda"), [("12.4", 12), ("13.0", 13), ("14.1", 13)])
def test_the_first_call_installs_what_the_driver_can_run(gpu: Gpu, driver: str, cuda: int):
    gpu.script("nvidia-smi", NVIDIA_SMI, cuda=driver)
    done = gpu("compare", PYTHON=None)
    assert done.code == 0, done.err
    assert done.out.startswith(f"installing CuPy, JAX and PyTorch for CUDA {cuda} into .venv-gpu\n")
    venv, pip, *ran = gpu.ran
    assert venv == "python3 -m venv .venv-gpu"
    assert pip.startswith(f"pip install --quiet -e .[dev,jax-cuda{cuda},cupy-cuda{cuda}x,torch] ")
    extras = re.findall(r"\[(.*)\]", pip)[0].split(",")
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    assert set(extras) <= project["optional-dependencies"].keys()
    assert [line.split()[:3] for line in ran] == [["-m", "gpt_xp", "compare"]]
    assert gpu("compare", PYTHON=None).code == 0
    assert len(gpu.ran) == 4, "the second call installs nothing"


@posix
def test_a_machine_without_a_gpu(gpu: Gpu):
    gpu.script("nvidia-smi", "#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    done = gpu("smoke", PYTHON=None)
    assert (done.code, done.out) == (1, "")
    assert done.err == "gpu.sh: nvidia-smi finds no GPU here; without one there is nothing to run\n"
    assert not gpu.log.exists()


@posix
def test_a_part_that_does_not_exist(gpu: Gpu):
    done = gpu("smoke", "355M")
    assert (done.code, done.out) == (2, "")
    assert done.err == "gpu.sh: there is no part 355M; there are: smoke tests compare 124M 1558M\n"
    assert not (gpu.folder / "out").exists()


def test_the_limits_of_what_is_run_add_up_to_less_than_that_of_a_part():
    text = (SCRIPTS / "gpu.sh").read_text()
    limits = [int(each) for each in re.findall(r"^    (?:text|run) (\d+) ", text, re.MULTILINE)]
    assert len(limits) == 4
    assert sum(limits) < int(re.findall(r"LIMIT:-(\d+)", text)[0]) == 8 * 60


@pytest.fixture
def smoke(script):
    return script("gpu_smoke")


def test_smoke_passes_what_is_right(smoke, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--backends", "numpy", "--dtypes", "float32,float64"])
    with pytest.raises(SystemExit) as ended:
        smoke.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "13 checks passed, 0 failed" in out
    for what in (
        "float32, logits",
        "float64, text",
        "a batch",
        "a ring",
        "sampled",
        "another size",
        "gpt-xp --backend",
    ):
        assert re.search(rf"ok     .*{what}.*: ", out), what


def test_smoke_says_in_a_line_which_device_there_is_not(smoke, monkeypatch, capsys):
    pytest.importorskip("jax", reason="jax is not installed")
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--backends", "jax@tpu,numpy", "--dtypes", "float32"])
    with pytest.raises(SystemExit) as ended:
        smoke.main()
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert re.search("FAILED jax@tpu float32, loading: jax has no device 'tpu' here", out)
    assert "Traceback" not in out
    assert "9 checks passed, 1 failed" in out, "and goes on"


def test_smoke_finds_what_is_wrong(smoke, capsys):
    report, reference = smoke.Report(), smoke.Reference()
    wrong = smoke.load("numpy", "float32")
    wrong.params["wpe"] = wrong.params["wpe"][::-1]
    smoke.texts(report, reference, wrong, "wrong")
    smoke.shapes(report, reference, wrong, "wrong")
    assert report.passed == 1, "the settings"
    assert len(report.failed) == 6
    with report.check("a graph") as found:
        backend = SimpleNamespace(settings=lambda: {"cuda_graph": "no (its logits differ)"})
        smoke.check_graph(SimpleNamespace(backend=backend), found)
    with report.check("a warning"):
        warning = RuntimeWarning("decoding goes on without a graph")
        try:
            raise ValueError("deep inside")
        except ValueError as error:
            warning.__cause__ = error
        warnings.warn(warning, stacklevel=1)
    bytes_used = itertools.count(0, 5_000_000)
    model = SimpleNamespace(generate=lambda prompts, **options: None)
    smoke.memory(report, model, "numpy", lambda: next(bytes_used))
    assert report.failed[-3:] == ["a graph", "a warning", "numpy, memory of the device over 100 generations"]
    out = capsys.readouterr().out
    assert "graph: no (its logits differ)" in out
    assert 'raise ValueError("deep inside")' in out, "the whole traceback of what lost the graph"
    assert "RuntimeWarning: decoding goes on without a graph" in out
