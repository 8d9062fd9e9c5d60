"""Packed copies of a model's weights: `gpt-xp models pack`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="llvmlite is not installed: pip install 'gpt-xp[native]'")

from commands import Result
from gpt_xp_backends.native_backend import packed
from safetensors import safe_open

import gpt_xp
from gpt_xp import Model
from gpt_xp.errors import GptXpWarning

IDS = np.arange(17) % 11


@pytest.fixture(params=["float32", "float16", "int8", "int4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    quantize = kind if kind.startswith("int") else None
    gpt_xp.load("shakespeare", backend="native", quantize=quantize).save(tmp_path)
    return tmp_path


def load(folder: Path, kind: str) -> Model:
    return gpt_xp.load(folder, backend="native", dtype="float32" if kind.startswith("int") else kind)


def test_a_start_maps_the_copy_and_packs_nothing(
    call: Callable[..., Result], folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load(folder, kind).logits(IDS)
    done = call("models", "pack", str(folder), *(["--dtype", kind] if kind == "float16" else []))
    path = Path(done.out.strip())
    assert path.parent == folder
    assert path.stat().st_size >= sum(weight.nbytes for weight in _packed(load(folder, kind)))
    with monkeypatch.context() as patch:
        patch.setattr(packed, "pack", lambda *args: pytest.fail("it was packed again"))
        model = load(folder, kind)
    assert np.array_equal(model.logits(IDS), right)
    assert all(not weight.panels.flags.owndata for weight in _packed(model))
    # Saving, and other backends, do without it.
    if not kind.startswith("int"):  # NumPy would need Numba.
        gpt_xp.load(folder, backend="numpy").logits(IDS)
    model.save(folder / "saved")
    assert not any(file.name.startswith(".packed") for file in (folder / "saved").iterdir())


def _packed(model: Model) -> list[Any]:
    return [layer["w"] for block in model._decoder.params["blocks"] for part in ("attn", "mlp")
            for layer in block[part].values()]  # fmt: skip


@pytest.mark.parametrize("kind", ["float32"], indirect=True)
def test_other_params_are_packed(call: Callable[..., Result], folder: Path, kind: str) -> None:
    call("models", "pack", str(folder))
    model = load(folder, kind)
    before, params = model.logits(IDS), gpt_xp.load(folder, backend="numpy").params
    model.params = params | {"wte": 2 * np.asarray(params["wte"])}
    assert np.abs(model.logits(IDS) - before).max() > 0.1


@pytest.mark.parametrize("kind", ["int8", "int4"], indirect=True)
def test_a_copy_without_scales_is_not_used(call: Callable[..., Result], folder: Path, kind: str) -> None:
    right = load(folder, kind).logits(IDS)
    path = Path(call("models", "pack", str(folder)).out.strip())
    path.write_bytes(path.read_bytes().replace(b"wte.scales", b"wte.SCALES"))
    with pytest.warns(GptXpWarning, match="wte.scales"):
        assert np.array_equal(load(folder, kind).logits(IDS), right)


@pytest.mark.parametrize("kind", ["float32"], indirect=True)
def test_shards_of_any_name_are_told_from_others(call: Callable[..., Result], folder: Path, kind: str) -> None:
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    with safe_open(folder / "part-1.safetensors", "np") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(list(file.keys()), "part-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    call("models", "pack", str(folder))
    assert load(folder, kind).backend._packed  # type: ignore[attr-defined]
    os.utime(folder / "part-1.safetensors", ns=(1, 1))
    with pytest.warns(GptXpWarning, match="other weights"):
        load(folder, kind)


@pytest.mark.parametrize("kind", ["float32"], indirect=True)
def test_weights_that_change_while_they_are_packed(
    call: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packed.pack

    def change(*args: Any, **options: Any) -> Any:
        os.utime(folder / "model.safetensors", ns=(1, 1))
        return real(*args, **options)

    monkeypatch.setattr(packed, "pack", change)
    done = call("models", "pack", str(folder))
    assert (done.code, done.out) == (1, "")
    assert "changed while they were packed" in done.err
    assert not any(file.name.startswith(".packed") for file in folder.iterdir())


@pytest.mark.parametrize("kind", ["float32"], indirect=True)
@pytest.mark.parametrize("fault", ["other weights", "cut off", "no such tensor", "empty"])
def test_a_copy_that_is_wrong_is_not_used(call: Callable[..., Result], folder: Path, kind: str, fault: str) -> None:
    path = Path(call("models", "pack", str(folder)).out.strip())
    if fault == "other weights":
        right = gpt_xp.load("shakespeare", backend="numpy")
        other = right.params | {"wte": 2 * np.asarray(right.params["wte"])}
        Model(other, right.config, right.tokenizer).save(folder)
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"cut off": content[:-100], "no such tensor": content.replace(b"wte.panels", b"etw.panels"), "empty": b""}[
                fault
            ]
        )
    with pytest.warns(GptXpWarning, match="gpt-xp models pack"):
        found = load(folder, kind).logits(IDS)
    expected = gpt_xp.load(folder, backend="numpy").logits(IDS)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["float32"], indirect=True)
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="this user may write everywhere")
def test_a_folder_that_cannot_be_written_to(call: Callable[..., Result], folder: Path) -> None:
    folder.chmod(0o500)
    assert "cannot write" in call("models", "pack", str(folder)).err
    folder.chmod(0o700)
