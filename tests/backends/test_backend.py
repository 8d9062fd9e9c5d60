"""Backends: finding and choosing one, refused arguments, and the detection of a wrong one."""

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest
from commands import in_a_new_process
from comparison import TOLERANCE, assert_values
from libraries import make_backend, skipping_what_is_missing
from small_models import CONFIGS, GOLDENS, small_params, small_tokens

import gpt_xp
from gpt_xp import Backend, Model
from gpt_xp.backend import import_library
from gpt_xp.benchmark.models import bench
from gpt_xp.errors import BackendError, SettingError
from gpt_xp.installation import install_command
from gpt_xp.registry import check_installed, get_backend
from gpt_xp.reporting.text import closest_first

# Modules are imported only when they are needed.


def test_generating_imports_no_other_command() -> None:
    code = """
import json, os, sys
from gpt_xp.cli import run
sys.argv, sys.stdout = ["gpt-xp", "A", "-n", "1"], open(os.devnull, "w")
assert run() == 0
print(json.dumps(sorted(sys.modules)), file=sys.__stdout__)
"""
    loaded = set(in_a_new_process(code))
    assert "gpt_xp.generation.decoder" in loaded
    others = (
        "gpt_xp.training",
        "gpt_xp.comparison",
        "gpt_xp.benchmark",
        "gpt_xp.tokenizer.training",
        "gpt_xp.cli.train",
    )
    assert not [name for name in loaded if name.startswith(others)]


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    code = """
import gpt_xp, json
listed = dir(gpt_xp)
print(json.dumps([name for name in gpt_xp.__all__ if name not in listed or not hasattr(gpt_xp, name)]))
"""
    assert in_a_new_process(code) == []
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gpt_xp.trian  # noqa: B018


def test_a_numpy_model_imports_no_other_array_library() -> None:
    code = (
        "import gpt_xp, sys, json; gpt_xp.load(backend='numpy').generate('a', max_tokens=2);"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.partition(".")[0] for name in in_a_new_process(code)}
    assert not loaded & {"jax", "cupy", "tensorflow", "torch", "array_api_strict", "requests"}


def test_generating_on_numpy_imports_a_part_of_numpy() -> None:
    """Importing all of NumPy takes longer than the rest of a start. A function used in each step can cause it."""
    code = """
import gpt_xp, sys, json
model = gpt_xp.load("shakespeare", backend="numpy")
model.generate("ROMEO:", max_tokens=2, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)
print(json.dumps([name for name in ("numpy.f2py", "numpy.testing", "array_api_compat.numpy") if name in sys.modules]))
"""
    assert in_a_new_process(code) == []


def test_importing_sets_nothing_in_jax() -> None:
    make_backend("jax")
    code = """
import json, jax
before = dict(jax.config.values)
import gpt_xp, gpt_xp_backends.jax_backend
gpt_xp.registry.get_backend("jax", dtype="float64").asarray(__import__("numpy").zeros(3), "float64")
print(json.dumps(sorted(key for key, value in jax.config.values.items() if before[key] != value)))
"""
    assert in_a_new_process(code) == []


def test_a_cache_of_the_users_own_is_left_alone(tmp_path: Any) -> None:
    make_backend("jax")
    code = (
        "import json, jax, gpt_xp; gpt_xp.load(backend='jax'); print(json.dumps(jax.config.jax_compilation_cache_dir))"
    )
    assert in_a_new_process(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)


# Found and chosen.


def test_what_backends_there_are() -> None:
    found = {info.name: info for info in gpt_xp.backends()}
    assert found.keys() >= {"numpy", "jax", "cupy", "torch", "mlx", "array-api-strict"}
    assert found["numpy"].version == np.__version__
    assert found["numpy"].devices[0].name == "cpu"
    for info in found.values():
        assert (info.problem is None) == bool(info.devices)
        assert (info.problem is None) or "pip install" in str(info.fix) or "driver" in str(info.fix)


def test_the_default_and_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPT_XP_BACKEND", raising=False)
    assert get_backend().name == "numpy"
    monkeypatch.setenv("GPT_XP_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="there is no backend 'nonsense'"):
        get_backend()
    assert get_backend("numpy").name == "numpy"


def test_a_wrong_name_lists_the_right_ones_closest_first() -> None:
    with pytest.raises(BackendError, match=r"there is no backend 'jaxx'; there are: jax, "):
        get_backend("jaxx")
    assert closest_first("cup", ["numpy", "jax", "cupy"])[0] == "cupy"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("numpy", {"device": "cuda:0"}, "numpy has no device 'cuda:0', only cpu"),
        ("numpy", {"dtype": "float16"}, "numpy does not compute in float16 on cpu, only in float32, float64"),
        ("numpy", {"dtype": "int8"}, "numpy does not compute in int8"),
        ("numpy", {"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ("numpy", {"threads": "a"}, "threads must be a whole number of at least 1, not 'a'"),
        ("numpy", {"dtype": np.float64}, "dtype must be a name, one of float32, float64, not <class"),
        ("jax", {"device": "cuda:7"}, "jax has no device 'cuda:7' here, only cpu"),
        ("jax", {"device": "cpu:99"}, "jax has no device 'cpu:99' here"),
        ("jax", {"device": "cpu:-1"}, "jax has no device 'cpu:-1' here"),
        ("jax", {"device": "cpu", "dtype": "bfloat16"}, "jax does not compute in bfloat16 on cpu"),
        ("torch", {"device": "cuda:7"}, "torch has no device 'cuda:7' here, only cpu"),
        ("torch", {"device": "cpu:1"}, "torch has no device 'cpu:1' here"),
        ("torch", {"device": "nonsense"}, "torch has no device 'nonsense' here, only cpu"),
        ("torch", {"dtype": "int8"}, "torch does not compute in int8"),
        ("mlx", {"device": "gpu:7"}, "mlx has no device 'gpu:7' here, only cpu"),
        ("mlx", {"dtype": "float64"}, "mlx does not compute in float64 on cpu, only in float32, bfloat16, float16"),
        ("mlx", {"threads": 2}, "mlx has no threads to set"),
        (
            "array-api-strict",
            {"device": "device9"},
            "array-api-strict has no device 'device9', only CPU_DEVICE, device1",
        ),
        ("array-api-strict", {"dtype": "float16"}, "array-api-strict does not compute in float16 on CPU_DEVICE"),
        ("array-api-strict", {"threads": 2}, "array-api-strict has no threads to set"),
        ("jax", {"threads": 1}, "jax cannot change its number of threads once it is loaded: set NPROC=1"),
    ],
)
def test_what_a_backend_refuses(name: str, options: dict[str, Any], message: str) -> None:
    make_backend(name)
    with pytest.raises(BackendError, match=message):
        get_backend(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "data=99,model=2"}, "the mesh data=99,model=2 needs 198 devices, and there "),
        ({"mesh": "data=2", "device": "cpu:1"}, "a mesh takes all devices of a platform, not 'cpu:1' alone"),
        ({"mesh": "data=2", "device": "tpu"}, "jax has no device 'tpu' here, only cpu"),
        ({"mesh": "4"}, "mesh must be data=N, model=N, data=N,model=N, or auto, .* not '4'"),
        ({"mesh": "data=2,data=2"}, "mesh must be data=N"),
        ({"mesh": "data=0"}, "mesh must be data=N"),
        ({"mesh": "rows=2"}, "mesh must be data=N"),
        ({"mesh": ""}, "mesh must be data=N"),
        ({"mesh": 4}, "mesh must be data=N, .* not 4"),
        ({"hosts": "127.0.0.1:7000,2,0"}, "hosts joins processes for a mesh: give mesh too"),
        ({"mesh": "auto", "hosts": "127.0.0.1,2,0"}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
        ({"mesh": "auto", "hosts": "127.0.0.1:70000,2,0"}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
        ({"mesh": "auto", "hosts": "127.0.0.1:7000,2,2"}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
        ({"mesh": "auto", "hosts": "127.0.0.1:7000,2"}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
        ({"mesh": "auto", "hosts": ":7000,2,0"}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
        ({"mesh": "auto", "hosts": 7000}, "hosts must be ADDRESS:PORT,COUNT,INDEX"),
    ],
)
def test_meshes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    make_backend("jax")
    with pytest.raises((BackendError, SettingError), match=message):
        get_backend("jax", **options)


def test_a_mesh_is_for_jax_alone_and_settled_when_a_backend_is_made(backend: Backend) -> None:
    with pytest.raises(BackendError, match="mesh and hosts are settled when a Backend is made"):
        gpt_xp.load("shakespeare", backend=backend, mesh="data=2")
    if backend.name != "jax":
        with pytest.raises(BackendError, match=f"{backend.name} computes on one device; a mesh needs jax"):
            gpt_xp.load("shakespeare", backend=backend.name, mesh="data=2")


def test_a_mesh_of_one_device_gives_the_same_text(shakespeare: gpt_xp.Model) -> None:
    """Larger meshes are tested by: pytest -m mesh."""
    make_backend("jax")
    model = gpt_xp.load("shakespeare", backend="jax", mesh="data=1")
    assert model.backend.device == "mesh data=1 of cpu"
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 11}
    assert model.generate("ROMEO:", **options).token_ids == shakespeare.generate("ROMEO:", **options).token_ids


def fake_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake MLX with a GPU, with what `MLXBackend.__init__` uses. It cannot compute."""
    mx = SimpleNamespace(
        __version__="0.32", cpu="cpu", gpu="gpu", Device=lambda kind, index=0: (kind, index), device_count=lambda _: 1,
        is_available=lambda kind: True, default_device=lambda: ("gpu", 0), get_peak_memory=lambda: 0,
        eval=None, stream=print,
        device_info=lambda device: {"device_name": "Apple M5", "memory_size": 2**34},
        **dict.fromkeys(("arange", "asarray", "full", "ones", "zeros")),
    )  # fmt: skip
    monkeypatch.setattr("gpt_xp_backends.mlx_backend.import_library", lambda name, fix: mx)


def test_mlx_on_a_gpu_is_refused_where_it_may_round_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mlx(monkeypatch)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    with pytest.raises(BackendError, match="TF32 on some GPUs: set MLX_ENABLE_TF32=0 before Python starts"):
        get_backend("mlx")
    assert get_backend("mlx", device="cpu").device == "cpu"
    assert get_backend("mlx", dtype="bfloat16").device == "gpu"
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert get_backend("mlx").device_memory == 2**34


def test_mlx_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, fix: str) -> None:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr("gpt_xp_backends.mlx_backend.import_library", fail)
    fix = re.escape(install_command("mlx"))
    with pytest.raises(BackendError, match=rf"mlx cannot be loaded \(libmlx.so: .*\): {fix}"):
        get_backend("mlx")


def test_a_missing_library_is_one_clear_error_and_others_are_let_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with pytest.raises(BackendError, match="no_such_library is not installed: pip install it"):
        import_library("no_such_library", "pip install it")
    with pytest.raises(BackendError, match="no_such_library is not installed"):
        import_library("no_such_library.core", "pip install it")
    (tmp_path / "half_a_library.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        import_library("half_a_library", "pip install it")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("torch", "torch", "torch"),
        ("array-api-strict", "array_api_strict", "strict"),
        ("jax", "jax", "jax"),
        ("cupy", "cupy", "cupy-cuda13x"),
        ("mlx", "mlx.core", "mlx"),
    ],
)
def test_how_to_get_what_is_missing(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = install_command(extra)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(BackendError) as error:
        get_backend(name)
    package = module.partition(".")[0]
    assert str(error.value).startswith(f"{package} is not installed: {fix}")
    [info] = [info for info in gpt_xp.backends() if info.name == name]
    assert (info.version, info.problem) == (None, f"{package} is not installed")
    assert str(info.fix).startswith(fix)


@pytest.mark.parametrize("device", ["device2", "no_float64"])
def test_other_devices_of_the_strict_library(device: str) -> None:
    """One device has float32 as its default dtype, like PyTorch; one has no float64, like a GPU of Apple."""
    xp = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    if device == "no_float64" and all(device not in str(each) for each in xp.__array_namespace_info__().devices()):
        pytest.skip(f"array-api-strict {xp.__version__} has no such device")
    model = Model(small_params("prime"), CONFIGS["prime"], backend=get_backend("array-api-strict", device=device))
    logits = model.logits(small_tokens("prime"))
    assert_values(logits[:, ::3], GOLDENS["prime/logits"], TOLERANCE["logits", "float32"])
    options = {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1}
    assert model.generate([1, 2, 3], max_tokens=5, **options).token_ids
    if device == "no_float64":
        with pytest.raises(BackendError, match="array-api-strict does not compute in float64 on no_float64"):
            get_backend("array-api-strict", device=device, dtype="float64")


def test_a_backend_in_hand_is_taken_as_it_is() -> None:
    backend = make_backend("numpy", "float64")
    assert get_backend(backend) is backend
    assert get_backend(backend, dtype="float64") is backend
    with pytest.raises(BackendError, match="settled when a Backend is made"):
        get_backend(backend, device="cpu")


def test_threads_of_numpy_are_limited_while_it_computes() -> None:
    import threadpoolctl

    seen = []
    backend = get_backend("numpy", threads=1)
    backend.compile(lambda: seen.extend(pool["num_threads"] for pool in threadpoolctl.threadpool_info()))()
    assert seen
    assert set(seen) == {1}


def test_threads_of_jax_are_limited() -> None:
    make_backend("jax")
    code = """
import json, time, gpt_xp
model = gpt_xp.load(backend="jax", threads=1)
import jax
f = jax.jit(lambda x: x @ x)
x = jax.numpy.ones((2000, 2000))
f(x).block_until_ready()
wall, cpu = time.perf_counter(), time.process_time()
for _ in range(5):
    f(x).block_until_ready()
print(json.dumps((time.process_time() - cpu) / (time.perf_counter() - wall)))
"""
    assert in_a_new_process(code) < 1.4  # processors busy on average


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])
def test_jax_that_cannot_start_says_so(platform: str) -> None:
    if any(device.name.startswith("cuda") for info in gpt_xp.backends() for device in info.devices):
        pytest.skip("there is a CUDA device here")
    make_backend("jax")
    code = """
import json, gpt_xp
try:
    gpt_xp.load(backend="jax")
except gpt_xp.errors.BackendError as error:
    [info] = [info for info in gpt_xp.backends() if info.name == "jax"]
    print(json.dumps([str(error), f"{info.problem}: {info.fix}"]))
"""
    error, listed = in_a_new_process(code, JAX_PLATFORMS=platform)
    assert error == listed
    assert f"jax cannot start on JAX_PLATFORMS='{platform}'" in error
    assert "unset that variable" in error


def test_cupy_without_a_gpu_says_so() -> None:
    with skipping_what_is_missing("cupy"):
        import cupy
    if cupy.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BackendError, match="finds no CUDA device"):
        get_backend("cupy")
    [info] = [info for info in gpt_xp.backends() if info.name == "cupy"]
    assert info.version is not None
    assert "driver" in str(info.fix)


# A wrong backend is caught. Each of these has one wrong function, and the suite's comparison must fail on it.


def gelu_by_erf(x: Any) -> Any:
    """Return the values of `tanh` with which the model's formula computes GELU's other form."""
    erf = np.vectorize(__import__("math").erf)
    grid = np.linspace(-20, 20, 200_001)
    inner = np.sqrt(2 / np.pi) * (grid + 0.044715 * grid**3)
    return erf(np.interp(x, inner, grid) / np.sqrt(2)).astype(x.dtype)


PLANTED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "softmax without the maximum": ("sharp", "max", lambda x, **kw: np.zeros_like(np.max(x, **kw))),
    "products in float16": ("prime", "matmul", lambda a, b: (a.astype("f2") @ b.astype("f2")).astype(a.dtype)),
    "products rounded to 10 bits": ("prime", "matmul", lambda a, b: rounded(a) @ rounded(b)),
    "GELU by erf": ("prime", "tanh", gelu_by_erf),
    "no causal mask": ("prime", "astype", lambda x, dtype, **kw: np.zeros(x.shape, dtype) if x.dtype == bool else x),
    "positions off by one": ("prime", "take", lambda x, ids, axis: np.take(x, np.maximum(ids - 1, 0), axis=axis)),
    "unscaled layer norm": ("prime", "sqrt", np.ones_like),
    "heads mixed up": ("prime", "permute_dims", lambda x, axes: np.ascontiguousarray(np.transpose(x, axes)[::-1])),
    "sums in the wrong axis": ("prime", "mean", lambda x, axis, keepdims: np.mean(x, axis=-2, keepdims=True)),
}  # fmt: skip


def rounded(x: Any) -> Any:
    """Round float32 to the 10 bits of TF32."""
    return (x.view("u4") & np.uint32(0xFFFFE000)).view("f4")


def wrong_backend(function: str, replacement: Callable[..., Any]) -> Backend:
    names = {name: getattr(numpy_namespace, name) for name in dir(numpy_namespace) if not name.startswith("__")}
    return make_backend("numpy").replace(xp=SimpleNamespace(**names | {function: replacement}))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_backend_is_caught(bug: str) -> None:
    name, function, replacement = PLANTED[bug]
    model = Model(small_params(name), CONFIGS[name], backend=wrong_backend(function, replacement))
    with pytest.raises(AssertionError, match=r"differs by|not finite"):
        assert_values(
            model.logits(small_tokens(name))[:, ::3], GOLDENS[f"{name}/logits"], TOLERANCE["logits", "float32"]
        )


@pytest.mark.parametrize("name", ["prime", "sharp"])
def test_a_backend_through_the_same_namespace_is_right(name: str) -> None:
    model = Model(small_params(name), CONFIGS[name], backend=wrong_backend("tanh", np.tanh))
    assert_values(model.logits(small_tokens(name))[:, ::3], GOLDENS[f"{name}/logits"], TOLERANCE["logits", "float32"])


def test_what_a_backend_does_not_have_cannot_be_replaced() -> None:
    backend = make_backend("numpy")
    assert backend.replace(cache_slots=lambda n, n_ctx: 7).cache_slots(1, 2) == 7
    with pytest.raises(TypeError, match="a backend has no attribute or method 'slots'"):
        backend.replace(slots=lambda n, n_ctx: 7)


# --- what is not installed --------------------------------------------------------------------------------------------


def test_a_checkout_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_xp.registry.entry_points", lambda group: [])
    for ask in (lambda: gpt_xp.load(backend="numpy"), gpt_xp.load, gpt_xp.backends, lambda: gpt_xp.compare(["numpy"])):
        with pytest.raises(BackendError, match=r"gpt-xp is not installed.*: in its checkout, run: pip install -e \."):
            ask()


def test_backends_that_cannot_be_listed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('gpt-xp: error: no luck')"
    monkeypatch.setattr("gpt_xp.processes.own_command", lambda *arguments: [sys.executable, "-c", code])
    for function in (gpt_xp.compare, bench):
        with pytest.raises(BackendError, match="the installed backends cannot be listed: no luck"):
            function(model="shakespeare")


def test_what_is_missing_is_known_without_importing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"cupy": "cupy", "jax": "jax", "torch": "torch", "mlx": "mlx", "array-api-strict": "array_api_strict"}
    for module in (*libraries.values(), "numba"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    check_installed("numpy")
    for name, module in libraries.items():
        with pytest.raises(BackendError, match=f"{module} is not installed: pip install "):
            check_installed(name)
    with pytest.raises(BackendError, match=f"numba is not installed: {re.escape(install_command('quantize'))}"):
        check_installed("numpy", quantized=True)
    with pytest.raises(BackendError, match="there is no backend 'numpi'; there are: numpy"):
        check_installed("numpi")


@pytest.mark.parametrize("function", [gpt_xp.compare, bench])
def test_a_missing_backend_is_an_error_before_any_process_starts(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("subprocess.Popen", lambda *args, **settings: pytest.fail("a process was started"))
    with pytest.raises(BackendError, match="torch is not installed"):
        function(["numpy", "torch@cuda"], "shakespeare")


@pytest.mark.parametrize("function", [gpt_xp.compare, bench])
@pytest.mark.parametrize("settings", [{}, {"dtypes": "float8"}])
def test_one_name_is_a_list_of_one(function: Callable[..., Any], settings: dict[str, str]) -> None:
    error, message = (SettingError, "no dtype 'float8'") if settings else (BackendError, "no backend 'numpi'")
    with pytest.raises(error, match=message):
        function("numpy" if settings else "numpi", "shakespeare", **settings)
