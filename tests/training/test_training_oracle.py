"""Training against torch and transformers, step by step: pytest -m oracle.

Torch computes in float64. What is compared is how far each tensor has moved from where it began, for that is what
training computes; the values themselves would agree to more digits.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from comparison import TOLERANCE, assert_values
from libraries import skipping_what_is_missing
from small_trainings import SMALL, story

import gpt_xp
from gpt_xp.checkpoint import checkpoint
from gpt_xp.checkpoint.safetensors_file import open_safetensors
from gpt_xp.checkpoint.weights import WEIGHTS
from gpt_xp.training.corpus import crops
from gpt_xp.training.program import Program, jax_backend
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.training.start import random_params

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # of torch and transformers about themselves
]
CONFIG = gpt_xp.GPT2Config(n_vocab=277, n_ctx=37, n_embd=39, n_head=3, n_layer=2)
HOW = {"batch_size": 5, "accumulate": 3, "learning_rate": 0.01, "weight_decay": 0.3, "clip": 0.5, "beta2": 0.95}


@pytest.fixture(scope="module", autouse=True)
def _oracles() -> Iterator[None]:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev,oracle]'")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev,oracle]'")
    with skipping_what_is_missing("jax"):
        jax_backend(TrainingSettings(data=("x",)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Torch:
    """The same training in torch: transformers' model, AdamW with two groups, clip_grad_norm_, LambdaLR."""

    def __init__(self, directory: Path, settings: TrainingSettings, n_frozen: int = 0) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        self.settings = settings
        self.model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        body = self.model.transformer
        for frozen in [body.wte, body.wpe, *body.h[:n_frozen]] if n_frozen else []:
            frozen.requires_grad_(False)
        self.before = self.tensors()
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        groups = [
            {"params": [each for each in self.trained if each.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [each for each in self.trained if each.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        warmup, steps, least = self.settings.warmup, self.settings.steps, self.settings.min_learning_rate
        if step < warmup:
            return step / warmup
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    def step(self, batches: Sequence[np.ndarray]) -> tuple[float, float]:
        """Take a step on some batches of rows; return the loss and the norm of the gradient."""
        import torch

        total = 0.0
        self.optimizer.zero_grad()
        for rows in batches:
            ids = torch.tensor(rows, dtype=torch.long)
            logits = self.model(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / len(batches)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        return total, float(norm)

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: each.detach().numpy().copy() for name, each in self.model.named_parameters()}


def read(directory: Path) -> dict[str, np.ndarray]:
    with open_safetensors(str(directory / WEIGHTS)) as file:
        return {name: np.array(file.read(name), dtype=np.float64) for name in file.tensors}


def assert_moved_alike(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    before: dict[str, np.ndarray],
    tolerance: str = "gradient",
) -> None:
    assert ours.keys() == theirs.keys()
    for name, start in before.items():
        moved, wanted = ours[name] - start, theirs[name] - start
        if name.endswith("c_attn.bias"):
            # Softmax takes away what all keys have in common, so the gradient of their bias is zero but for rounding,
            # and Adam divides even that by its size.
            n = len(moved) // 3
            moved, wanted = np.delete(moved, slice(n, 2 * n)), np.delete(wanted, slice(n, 2 * n))
        if wanted.any():
            assert_values(moved, wanted, TOLERANCE[tolerance, "float32"])
        else:
            assert not moved.any(), name


def test_steps_are_those_of_torch(tmp_path: Path) -> None:
    settings = TrainingSettings(data=("x",), steps=5, warmup=2, **HOW)
    params = random_params(CONFIG, seed=3)
    checkpoint.save(tmp_path / "before", params, CONFIG)
    theirs = Torch(tmp_path / "before", settings)
    program = Program(settings, CONFIG, params, jax_backend(settings))
    state, norms = program.initial_state(), []
    tokens = np.random.RandomState(0).randint(0, CONFIG.n_vocab, size=(5, 3, 5, 38)).astype(np.int32)
    for step, batches in enumerate(tokens):
        assert program.learning_rate(step) == pytest.approx(theirs.schedule.get_last_lr()[0], rel=1e-6)
        state, loss = program.train(state, batches, step)
        expected, norm = theirs.step(batches)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        norms.append(norm)
    assert min(norms) < settings.clip < max(norms)  # some are clipped and others not
    checkpoint.save(tmp_path / "after", program.weights(state), CONFIG)
    assert_moved_alike(read(tmp_path / "after"), theirs.tensors(), theirs.before)


def test_fine_tuning_with_frozen_blocks_is_that_of_torch(tmp_path: Path) -> None:
    """From text to checkpoint: the batches too are made again, of the ids that transformers' tokenizer gives."""
    from transformers import AutoTokenizer

    text = story(3000)
    (tmp_path / "text.txt").write_bytes(text.encode())
    checkpoint.save(
        tmp_path / "before", random_params(CONFIG, seed=3), CONFIG, gpt_xp.train_tokenizer([text], CONFIG.n_vocab)
    )
    how = {**HOW, "steps": 3, "warmup": 0, "eval_every": 3, "seq_len": 31, "seed": 7}
    found = gpt_xp.train(
        [tmp_path / "text.txt"], tmp_path / "after", start=str(tmp_path / "before"), freeze=1, val_fraction=0.25, **how
    )
    assert found.best.step == 3
    theirs = Torch(tmp_path / "before", TrainingSettings(data=("x",), **how), n_frozen=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "before")
    tokens = np.array(tokenizer(text[: int(0.75 * len(text))])["input_ids"])
    losses = [theirs.step(crops(tokens, 31, 15, seed=7, step=step).reshape(3, 5, 32))[0] for step in range(3)]
    assert found.best.train_loss == pytest.approx(np.mean(losses), rel=1e-6)
    ours, after = read(tmp_path / "after"), theirs.tensors()
    assert_moved_alike(ours, after, theirs.before, "first steps of Adam")  # there is no warm-up
    moved = {name for name, start in theirs.before.items() if not np.array_equal(ours[name], start)}
    assert moved == {name for name in ours if name.startswith(("transformer.h.1.", "transformer.ln_f."))}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_training_keeps_is_read_by_transformers(dtype: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    text = story(3000)
    (tmp_path / "text.txt").write_bytes(text.encode())
    gpt_xp.train([tmp_path / "text.txt"], tmp_path / "out", **SMALL, save_dtype=dtype)
    ours = gpt_xp.load(tmp_path / "out", backend="numpy")
    assert str(GPT2LMHeadModel.from_pretrained(tmp_path / "out").dtype) == f"torch.{dtype}"
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for piece in (text[:1000], "Ô, king;\n\n  the 42 queens\r\n"):
        ids = ours.tokenizer.encode(piece)
        assert ids == tokenizer(piece)["input_ids"]
        assert tokenizer.decode(ids) == piece
    assert tokenizer.eos_token_id == ours.tokenizer.eos_token_id == theirs.config.eos_token_id
    tokens = np.array(ours.tokenizer.encode(text))[: 5 * 37].reshape(5, 37)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert_values(ours.logits(tokens), expected, TOLERANCE["logits", "float32"])
    generated = theirs.generate(torch.tensor(tokens[:1, :5]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    wanted = ours.generate(tokenizer.decode(tokens[0, :5]), max_tokens=20).token_ids
    assert generated[0, 5:].tolist()[: len(wanted)] == list(wanted)
