"""What belongs to the user's process and machine: gpt-xp leaves it as it is, and needs no place to keep anything."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Result, in_a_new_process, posix, process
from libraries import skipping_what_is_missing

import gpt_xp
from gpt_xp.environment import gpt_xp_home, is_offline, says_yes
from gpt_xp.training.program import jax_backend
from gpt_xp.training.settings import TrainingSettings

# All that a program can have set: read before gpt-xp works, and after.
SNAPSHOT = """
import gc, json, locale, logging, os, random, signal, sys, warnings
import numpy as np

def snapshot():
    found = {
        **{f"variable {name}": value for name, value in os.environ.items()},
        "folder": os.getcwd(), "numpy errors": np.geterr(),
        "numpy random": repr(np.random.get_state()), "random": random.getstate()[1][:5],
        "warnings": list(map(repr, warnings.filters)), "gc": [gc.get_threshold(), gc.isenabled()],
        "hooks": [sys.unraisablehook is sys.__unraisablehook__, sys.excepthook is sys.__excepthook__],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "locale": locale.setlocale(locale.LC_ALL), "recursion": sys.getrecursionlimit(),
        "logging": [logging.root.level, len(logging.root.handlers)],
    }
    if "jax" in sys.modules:
        found |= {f"jax {name}": repr(value) for name, value in sys.modules["jax"].config.values.items()}
    if "torch" in sys.modules:
        import torch
        found["torch"] = [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())]
        found["torch precision"] = [torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()]
    if "matplotlib" in sys.modules:
        found |= {f"plot {name}": repr(value) for name, value in dict.items(sys.modules["matplotlib"].rcParams)}
    return found
"""
WORK = """
import tempfile
from pathlib import Path
import gpt_xp
import gpt_xp.benchmark.models, gpt_xp.comparison.driver, gpt_xp.training.loop
%(imports)s
before = snapshot()
model = gpt_xp.load(%(model)r, backend=%(backend)r, threads=2)
model.generate("A", max_tokens=3, temperature=0.5)
model.logits([1, 2, 3])
model.score("to be")
gpt_xp.load(%(model)r, backend=%(backend)r, dtype="float64").generate("A", max_tokens=2)
%(more)s
print(json.dumps([before, snapshot()]))
"""
TRAINING = """
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "text.txt").write_text("to be or not to be " * 40)
    gpt_xp.train(
        [Path(folder, "text.txt")], Path(folder, "out"), steps=1, n_layer=1, n_head=1, n_embd=8, n_ctx=8,
        vocab_size=260, batch_size=1, accumulate=1, plot=str(Path(folder, "plot.png")),
    )
"""


@pytest.fixture
def no_jax_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away where the suite keeps compiled programs."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def needs_jax() -> None:
    with skipping_what_is_missing("jax"):
        jax_backend(TrainingSettings(data=("x",)))


THEIRS = "variable KMP_DUPLICATE_LIB_OK"  # threadpoolctl sets it when it is imported


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a directory with the first layer of the bundled model, which JAX compiles sooner."""
    whole, folder = gpt_xp.load("shakespeare", backend="numpy"), tmp_path_factory.mktemp("model")
    params, config = whole.params | {"blocks": whole.params["blocks"][:1]}, replace(whole.config, n_layer=1)
    gpt_xp.Model(params, config, whole.tokenizer, whole.backend).save(folder)
    return str(folder)


def changed(backend: str, model: str, imports: str = "", more: str = "") -> dict[str, Any]:
    """Return what has changed in a process that has worked on a backend, from what it was to what it is."""
    code = SNAPSHOT + WORK % {"backend": backend, "model": model, "imports": imports, "more": more}
    before, after = in_a_new_process(code)
    # What a library sets when it is imported is its own: settings of JAX, and a variable of threadpoolctl.
    names = before | {name: None for name in after if name.startswith("variable") and name != THEIRS}
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


# --- the process ------------------------------------------------------------------------------------------------------


def test_work_on_numpy_changes_no_setting_of_the_process(home: Path, one_layer: str) -> None:
    assert changed("numpy", one_layer) == {}


def test_work_on_jax_changes_no_setting_of_the_process(
    home: Path, needs_jax: None, no_jax_variables: None, one_layer: str
) -> None:
    pytest.importorskip("matplotlib")
    # JAX has the threads that it starts with, so gpt-xp has to start it; what JAX itself sets then is no concern here.
    imports = f"""
import matplotlib
gpt_xp.load({one_layer!r}, backend="jax", threads=2)
assert "NPROC" not in os.environ
assert sys.modules["jax"].config.jax_compilation_cache_dir is None
"""
    assert changed("jax", one_layer, imports, TRAINING) == {}
    assert not home.exists(), "the library keeps nothing"


def test_work_on_torch_changes_no_setting_of_the_process(home: Path, one_layer: str) -> None:
    with skipping_what_is_missing("torch"):
        import torch  # noqa: F401
    assert changed("torch", one_layer, "import torch") == {}


# --- where JAX's programs are kept ------------------------------------------------------------------------------------


def test_the_command_keeps_what_jax_compiles_by_cpu_and_versions(
    home: Path, needs_jax: None, no_jax_variables: None, one_layer: str
) -> None:
    import jax
    import jaxlib

    assert process("A", "-n", "2", "-m", one_layer, "-b", "jax").err == ""
    (folder,) = (home / "jax").iterdir()
    assert folder.name.startswith(f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-")
    kept = {path.name for path in folder.iterdir()}
    assert kept
    again = process("A", "-n", "2", "-m", one_layer, "-b", "jax")
    assert again.code == 0  # jaxlib 0.10.0 writes to stderr which features of this CPU its programs were made for
    assert {path.name for path in folder.iterdir()} >= kept


def test_the_folder_has_another_name_on_another_cpu(monkeypatch: pytest.MonkeyPatch, needs_jax: None) -> None:
    import jax
    from gpt_xp_backends import jax_programs as adapter

    here = adapter.shareable(jax)
    assert here == adapter.shareable(jax)
    monkeypatch.setattr(adapter, "_cpu", lambda: ["flags: avx512_bf16"])
    assert adapter.shareable(jax) != here
    monkeypatch.undo()
    monkeypatch.setattr(jax, "__version__", "0.11.13")
    assert adapter.shareable(jax) != here


def test_the_user_s_own_place_for_jax_is_left(
    home: Path, needs_jax: None, no_jax_variables: None, one_layer: str, tmp_path: Path
) -> None:
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    assert process("A", "-n", "2", "-m", one_layer, "-b", "jax", env=os.environ | mine).code == 0
    assert not home.exists()


# --- no place to keep anything ----------------------------------------------------------------------------------------

NOWHERE: dict[str, Any] = {"no home": None, "a home that cannot be made": "/dev/null/home"}


def without_home(*args: str, place: str | None) -> Result:
    """Run the command as a container does that has a numeric user, or with a home folder that is none."""
    keep = ("PATH", "JAX_PLATFORMS", "LANG", "PYTHONPATH")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    if place is not None:
        return process(*args, env=environment | {"HOME": place})
    command = [sys.executable, "-c", NO_PASSWD]
    return process(*args, command=command, env=environment)


NO_PASSWD = """
import os, sys
if os.name == "posix":
    import pwd
    def missing(who): raise KeyError(who)
    pwd.getpwuid = pwd.getpwnam = missing  # as for a user without an entry in /etc/passwd
else:
    os.path.expanduser = lambda path: path
from gpt_xp.cli import main
main()
"""


@posix
@pytest.mark.parametrize("place", NOWHERE.values(), ids=NOWHERE)
def test_all_that_needs_no_cache_works_without_one(place: str | None, needs_jax: None, one_layer: str) -> None:
    assert without_home("A", "-n", "3", place=place) == (0, process("A", "-n", "3").out, "")
    expected = process("A", "-n", "3", "-m", one_layer).out
    assert without_home("A", "-n", "3", "-m", one_layer, "-b", "jax", place=place) == (0, expected, "")


@posix
@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs setpriv, and to be root")
def test_a_numeric_user_without_a_home() -> None:
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", sys.executable]
    bare = {"PATH": os.environ["PATH"]}
    if process("-c", "import gpt_xp, numpy", command=user, env=bare).code != 0:
        pytest.skip("other users cannot read this checkout")
    result = process("-m", "gpt_xp", "models", command=user, env=bare)
    assert (result.code, result.err) == (0, "")
    assert "kept in GPT_XP_HOME (which is not set" in result.out


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, in this process."""
    for name in ("GPT_XP_HOME", "HOME", "USERPROFILE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)

    def fail(*args: object) -> None:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_dir", fail)


def test_without_a_place_each_command_says_so(call: Callable[..., Result], nowhere: None, tmp_path: Path) -> None:
    assert gpt_xp_home() is None
    assert '"folder": null' in call("models", "--json").out
    for args in (("models", "pull", "124M"), ("-m", "124M", "A")):
        assert call(*args) == (
            1, "", "gpt-xp: error: 124M cannot be kept anywhere: this user has no home directory; set GPT_XP_HOME to a "
            "folder\n",
        )  # fmt: skip
    assert call("models", "verify").code == 0
    for args in (("models", "rm", "124M"), ("models", "path", "124M"), ("-m", "124M", "--offline", "A")):
        code, out, err = call(*args)
        assert (code, out, err.count("\n")) == (1, "", 1)


def test_a_download_says_where_it_cannot_write(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_HOME", "/dev/null/home")
    code, out, err = call("models", "pull", "124M")
    assert (code, out) == (1, "")
    assert err.startswith(f"gpt-xp: error: cannot work in {Path('/dev/null/home/models/124M/hub')} (")
    assert err.endswith("or set GPT_XP_HOME to another folder\n")


def test_a_tilde_that_stands_for_nothing_is_no_folder(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_XP_HOME", "~/models")
    assert gpt_xp_home() is None
    monkeypatch.delenv("GPT_XP_HOME")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: f"~/.cache/{name}")  # some versions of it
    assert gpt_xp_home() is None


# --- variables that say yes or no -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_yes"),
    [
        ("1", True),
        ("2", True),
        ("yes", True),
        ("TRUE", True),
        ("0", False),
        ("False", False),
        ("off", False),
        ("", None),
    ],
)  # fmt: skip
def test_a_yes_is_the_same_everywhere(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, value: str, is_yes: bool | None
) -> None:
    monkeypatch.setenv("GPT_XP_OFFLINE", value)
    assert is_offline() == bool(is_yes)
    assert says_yes("GPT_XP_OFFLINE", default=True) == (is_yes is not False)
    if is_yes:  # otherwise the command would go and fetch it
        assert "gpt-xp is offline" in call("-m", "124M", "A").err
    assert call("A", "-n", "1", GPT_XP_JSON=value, GPT_XP_OFFLINE="").out.startswith("{") == bool(is_yes)
