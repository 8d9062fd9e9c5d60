"""PyTorch's adapter: the user's settings, refused arguments, devices. Its results are tested with all backends."""

import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import in_a_new_process
from comparison import TOLERANCE, assert_values
from gpt_xp_backends import torch_backend
from libraries import make_backend
from small_models import CONFIGS, GOLDENS, small_params, small_tokens

import gpt_xp
from gpt_xp import Model
from gpt_xp.backend import DeviceInfo
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.errors import BackendError
from gpt_xp.registry import get_backend


@pytest.fixture
def torch() -> Any:
    make_backend("torch")  # or skip
    import torch

    return torch


@pytest.fixture
def rounding(torch: Any) -> Iterator[None]:
    """Set PyTorch to round float32 products to bfloat16 on the CPU, and to TF32 on a GPU."""
    places = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def test_mapped_params_are_neither_copied_nor_warned_of() -> None:
    make_backend("torch")
    code = """
import json, gpt_xp
from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params
from gpt_xp.hub.find import find_model
folder = find_model("shakespeare")
config = read_config(folder)
mapped = read_params(folder, config, dtype=None)
model = gpt_xp.Model(mapped, config, backend="torch")
same = model.params["wte"].data_ptr() == mapped["wte"].ctypes.data
print(json.dumps([mapped["wte"].flags.writeable, str(mapped["wte"].dtype), same]))
"""
    writeable, dtype, same = in_a_new_process(code)  # where a warning is an error
    assert not writeable
    assert same == (dtype == "float32")


def test_the_memory_of_a_shared_array_stays_as_long_as_it_is_needed(torch: Any) -> None:
    array = np.arange(1e6, dtype=np.float32)
    array.flags.writeable = False
    tensor, expected = get_backend("torch").asarray(array), array.copy()
    assert tensor.data_ptr() == array.ctypes.data
    del array
    np.zeros(1_000_000, dtype=np.float32)
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("array", [np.float32(3), np.arange(6.0)[::-1], np.arange(6).reshape(2, 3).T, np.zeros((0, 3))])
def test_arrays_of_every_layout(torch: Any, array: Any) -> None:
    backend = get_backend("torch")
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(array)), array)
    half = backend.asarray(array, "bfloat16")
    assert half.dtype == torch.bfloat16
    assert backend.asarray(half).data_ptr() == half.data_ptr()


def test_threads_are_limited_while_it_computes_and_no_longer(torch: Any) -> None:
    before = torch.get_num_threads()
    backend = get_backend("torch", threads=before + 1)
    assert backend.compile(torch.get_num_threads)() == before + 1
    assert backend.settings()["threads"] == str(before + 1)
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        backend.compile(lambda: 1 / 0)()
    assert torch.get_num_threads() == before


@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # PyTorch 2.9 to this user
def test_float32_is_float32_even_where_the_user_allows_less(torch: Any, rounding: None) -> None:
    backend = get_backend("torch")
    logits = Model(small_params("prime"), CONFIGS["prime"], backend=backend).logits(small_tokens("prime"))
    assert_values(logits[:, ::3], GOLDENS["prime/logits"], TOLERANCE["logits", "float32"])
    assert backend.settings()["matmul_precision"] == "ieee"
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"

    random = np.random.RandomState(0)
    a, b = (backend.asarray(random.standard_normal((256, 256)), "float32") for _ in range(2))
    rounded, exact = a @ b, backend.compile(lambda: a @ b)()
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact, a @ b)
    if torch.equal(rounded, exact):
        pytest.skip("this processor has no bfloat16 products to be kept from")


def test_no_gradients_are_recorded_and_the_users_are_left_alone(torch: Any) -> None:
    backend = get_backend("torch")
    weight = torch.ones(3, requires_grad=True)
    assert backend.asarray(weight) is weight
    assert not backend.compile(lambda: weight * 2)().requires_grad
    assert (weight * 2).requires_grad
    np.testing.assert_array_equal(backend.to_numpy(weight), np.ones(3))


def test_gradients_on_the_functions_as_they_stand(torch: Any) -> None:
    """Gradients work outside the adapter. The oracle is transformers in float64."""
    xp = get_backend("torch").xp
    params = gpt_xp.tree.tree_map(lambda leaf: torch.tensor(leaf, dtype=torch.float32), small_params("prime"))
    weight = params["blocks"][0]["attn"]["c_attn"]["w"].requires_grad_()
    gpt_xp.lm_loss(params, torch.tensor(small_tokens("prime")), CONFIGS["prime"], xp=xp).backward()
    assert_values(weight.grad[:, ::3].numpy(), GOLDENS["prime/gradient"], TOLERANCE["gradient", "float32"])
    # With PyTorch's own int64 the namespace need not be given.
    loss = gpt_xp.lm_loss(params, torch.tensor(small_tokens("prime")).long(), CONFIGS["prime"])
    assert_values(loss.detach().numpy(), GOLDENS["prime/loss"], TOLERANCE["logits", "float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_generates_and_is_saved(torch: Any, dtype: str, tmp_path: Any) -> None:
    model = Model(small_params("prime"), CONFIGS["prime"], backend=get_backend("torch", dtype=dtype))
    ids = [1, 2, 3]
    out = model.generate(ids, max_tokens=5)
    assert out.token_ids[0] == model.logits(ids)[-1].argmax()
    assert out.stats.dtype == dtype
    model.save(tmp_path)
    params = read_params(tmp_path, model.config, dtype=None)
    assert params["wte"].dtype == ("float32" if dtype == "bfloat16" else "float16")
    np.testing.assert_array_equal(params["wte"], model.params["wte"].to(torch.float32).numpy())


def test_running_out_of_memory_is_recognised(torch: Any) -> None:
    is_out_of_memory = get_backend("torch").is_out_of_memory
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


# Devices that this machine need not have.


@pytest.fixture
def devices(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        properties = SimpleNamespace(name="GPU X", total_memory=80_000_000_000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)

    return pretend


def test_names_of_devices(devices: Callable[..., None]) -> None:
    devices(cuda=2)
    [info] = [info for info in gpt_xp.backends() if info.name == "torch"]
    assert [device.name for device in info.devices] == ["cpu", "cuda:0", "cuda:1"]
    assert info.devices[2].memory == 80_000_000_000
    for name, found in {"cuda": "cuda:0", "gpu": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu", None: "cpu"}.items():
        backend = get_backend("torch", device=name)
        assert backend.device == found
        assert backend.samples_on_host == (found == "cpu")
    with pytest.raises(BackendError, match="torch computes on cuda:1 and has no threads to set there"):
        get_backend("torch", device="cuda:1", threads=1)
    with pytest.raises(BackendError, match=r"torch has no device 'cuda:2' here, only cpu, cuda:0, cuda:1: https:"):
        get_backend("torch", device="cuda:2")


def test_apples_gpus_have_no_float64(devices: Callable[..., None]) -> None:
    devices(mps=True)
    for name in ("mps", "mps:0", "gpu"):
        assert get_backend("torch", device=name, dtype="bfloat16").device == "mps"
    with pytest.raises(BackendError, match="torch does not compute in float64 on mps, only in float32, bfloat16"):
        get_backend("torch", device="mps", dtype="float64")


def test_without_a_device_it_takes_pytorchs_default(torch: Any, devices: Callable[..., None]) -> None:
    devices(cuda=2)
    with torch.device("cuda:1"):
        assert get_backend("torch").device == "cuda:1"
    with torch.device("meta"), pytest.raises(BackendError, match="torch has no device 'meta' here"):
        get_backend("torch")


@pytest.mark.slow
def test_compiled_steps_are_the_same() -> None:
    make_backend("torch")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    code = """
import warnings
warnings.simplefilter("ignore")  # of torch.compile about itself
import json, sys
sys.path.insert(0, "tests/support")
import gpt_xp
from small_models import CONFIGS, small_params
outs = []
for name in ("numpy", "torch"):
    model = gpt_xp.Model(small_params("prime"), CONFIGS["prime"], backend=name)
    out = model.generate([1, 2, 3], max_tokens=20)
    outs.append([out.token_ids, out.logprobs])
print(json.dumps([*outs, model.backend.settings()["compiled"]]))
"""
    numpy, compiled, setting = in_a_new_process(code, GPT_XP_TORCH_COMPILE="1")
    assert setting == "yes"
    assert compiled[0] == numpy[0]
    np.testing.assert_allclose(compiled[1], numpy[1], atol=1e-4)


def test_a_prompt_is_computed_in_longer_pieces_on_a_gpu(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [get_backend("torch").chunk_tokens(batch) for batch in (1, 8)] == [128, 128]
    monkeypatch.setattr(torch_backend, "_devices", lambda torch: (DeviceInfo("cuda:0", "a GPU", 2**36),))
    assert [get_backend("torch", device="cuda").chunk_tokens(batch) for batch in (1, 8, 100)] == [1024, 512, 128]
