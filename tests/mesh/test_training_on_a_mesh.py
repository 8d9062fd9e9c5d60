"""Training on a mesh: the losses of one device, a part of the state on each device, one program, one state file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import leaves
from small_trainings import EVERYTHING, bits, log, story

import gpt_xp
from gpt_xp.errors import BackendError, SettingError
from gpt_xp.training.program import Program, jax_backend
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.training.start import random_params

CONFIG = gpt_xp.GPT2Config(n_vocab=252, n_ctx=36, n_embd=48, n_head=3, n_layer=2)
STEPS = 20


def trained(mesh: str | None, state: Any = None, first: int = 0, steps: int = STEPS) -> tuple[list[float], Any, float]:
    """Return the losses of some steps with dropout, the state after them, and the share of it on the first device."""
    import jax

    settings = TrainingSettings(
        data=("x",), steps=STEPS, warmup=2, batch_size=8, accumulate=2, weight_dropout=0.1, average=0.9, mesh=mesh
    )
    program = Program(settings, CONFIG, random_params(CONFIG, 7), jax_backend(settings))
    state = program.initial_state() if state is None else program.to_device(state)
    random, losses = np.random.RandomState(3), []
    rows = random.randint(0, CONFIG.n_vocab, size=(STEPS, 2, 8, 30)).astype(np.int32)
    for step in range(first, first + steps):
        state, loss = program.train(state, rows[step], step)
        losses.append(float(loss))
        if step == first:
            compiled = program._backend.compile_seconds()
    assert program._backend.compile_seconds() == compiled, "a later step was compiled again"
    arrays = jax.tree.leaves(state)
    device = jax.devices()[0]
    held = sum(part.data.nbytes for each in arrays for part in each.addressable_shards if part.device == device)
    fetched = jax.tree.map(program._backend.to_numpy, state)
    return losses, fetched, held / sum(each.nbytes for each in arrays)


@pytest.fixture(scope="module")
def alone(on_mesh: Callable[..., gpt_xp.Backend]) -> tuple[list[float], Any, float]:
    return trained(None)


@pytest.mark.parametrize("mesh", ["data=4", "data=2", "auto"])
def test_losses_and_params_are_those_of_one_device(alone: tuple[list[float], Any, float], mesh: str) -> None:
    losses, state, share = trained(mesh)
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=1e-5)
    for found, expected in zip(leaves(state["params"]), leaves(alone[1]["params"]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert share <= (0.3 if mesh != "data=2" else 0.55)


def test_resuming_on_other_numbers_of_devices(alone: tuple[list[float], Any, float]) -> None:
    losses, state = [], None
    for part, mesh in enumerate(("data=4", "data=2", None, "data=4")):
        more, state, _ = trained(mesh, state, first=5 * part, steps=5)
        losses += more
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=1e-5)


def test_a_run_is_resumed_with_another_mesh(tmp_path: Path, on_mesh: Callable[..., gpt_xp.Backend]) -> None:
    (tmp_path / "story.txt").write_text(story(2000))
    options = EVERYTHING | {"batch_size": 4, "steps": 6, "eval_every": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    gpt_xp.train(tmp_path / "story.txt", whole, **options)

    class Stop(gpt_xp.training.log.Watcher):
        def evaluated(self, evaluation: Any) -> None:
            if evaluation.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpt_xp.train(tmp_path / "story.txt", parts, watcher=Stop(), mesh="data=4", **options)
    assert b"mesh" not in (parts / "training" / "state.safetensors").read_bytes()
    same = tmp_path / "same"
    shutil.copytree(parts, same)
    gpt_xp.train(out=parts, resume=True, mesh="data=2")
    for found, expected in zip(log(parts), log(whole), strict=True):
        assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    # On the same mesh, a run that was stopped ends with the bits of one that was not.
    undisturbed = tmp_path / "undisturbed"
    gpt_xp.train(tmp_path / "story.txt", undisturbed, mesh="data=4", **options)
    gpt_xp.train(out=same, resume=True)
    assert bits(same) == bits(undisturbed)


def test_meshes_that_cannot_train(on_mesh: Callable[..., gpt_xp.Backend], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="mesh must be data=N or auto for training"):
        gpt_xp.train("x", tmp_path / "a", mesh="data=2,model=2")
    with pytest.raises(SettingError, match=r"batch_size 6 cannot be split equally over the mesh data=4 .* take 8"):
        gpt_xp.train("x", tmp_path / "a", mesh="data=4", batch_size=6)
    with pytest.raises(BackendError, match="the mesh data=5 needs 5 devices, and there are 4"):
        gpt_xp.train("x", tmp_path / "a", mesh="data=5", batch_size=5)
    assert not (tmp_path / "a").exists()
