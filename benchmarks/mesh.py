"""Measure what a mesh of JAX devices exchanges, holds and computes, on devices that XLA makes out of one CPU.

    pip install -e '.[train]'
    python benchmarks/mesh.py > mesh.md

It prints counts, bytes and differences, which do not depend on the machine's speed. It prints no seconds: four devices
on one CPU are slower than one.
"""

import collections
import os
import re
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import gpt_xp
from gpt_xp.generation.step_functions import decode_steps, next_token_logits
from gpt_xp.reporting.text import markdown_table
from gpt_xp.training.program import Program, jax_backend
from gpt_xp.training.settings import TrainingSettings
from gpt_xp.training.start import random_params

MESHES = ("data=1", "data=4", "data=2,model=2", "model=4", "model=3")
CONFIG = gpt_xp.GPT2Config(n_vocab=1021, n_ctx=128, n_embd=192, n_head=12, n_layer=2)
COLLECTIVE = re.compile(r" = .* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(")
PROMPTS = ["ROMEO:", "What is", "To be, or", "Enter the king"]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 11}
STEPS = 20


def main() -> None:
    print("Exchanges in a compiled program (2 layers, n_embd 192, 12 heads, 1021 tokens, 4 rows):\n")
    print(markdown_table([("program", "mesh", "all-reduce", "all-gather", "other"), *exchanges()]))
    print("The bundled model against NumPy: 4 prompts, 60 tokens; a text of 3 kB. MB of params on a device:\n")
    header = ("mesh", "sampled texts equal", "greedy", "log-probabilities differ by", "a score's by", "MB")
    print(markdown_table([header, *texts()]))
    print(f"{STEPS} steps of training with weight dropout 0.1, against one device:\n")
    header = ("mesh", "losses differ by", "share of the state on a device", "compiled after the first step")
    print(markdown_table([header, *trainings()]))


def exchanges() -> Iterator[tuple[str, ...]]:
    params = random_params(CONFIG, 1)
    filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": None, "repetition_penalty": None}
    for mesh in MESHES[1:]:
        model = gpt_xp.Model(params, CONFIG, backend=gpt_xp.get_backend("jax", mesh=mesh))
        put = model.backend.asarray

        def cache(model: gpt_xp.Model = model, put: Any = put) -> Any:
            return model.backend.new_cache(CONFIG, model.params["wpe"], 64, put(np.zeros(4, np.int32)))

        fixed = {"config": CONFIG, "xp": model.backend.xp}
        step = jax.jit(next_token_logits, static_argnames=("config", "xp"))
        for name, n in (("decode", 1), ("prefill of 64", 64)):
            compiled = step.lower(model.params, put(np.zeros((4, n), np.int32)), cache(), n, **fixed).compile()
            yield counted(name, mesh, compiled)
        block = jax.jit(decode_steps, static_argnames=("config", "xp", "k", "decode_block", "top_k"))
        noise = put(np.zeros((16, 4, CONFIG.n_vocab), np.float32))
        token = put(np.zeros(4, np.int32))
        more = {"k": 16, "decode_block": model.backend.decode_block} | fixed | filters
        compiled = block.lower(model.params, token, cache(), None, noise, None, **more).compile()
        yield counted("16 steps with top-k, top-p", mesh, compiled)


def counted(name: str, mesh: str, compiled: Any) -> tuple[str, ...]:
    found = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    reduce, gather = found.pop("all-reduce", 0), found.pop("all-gather", 0)
    return name, mesh, str(reduce), str(gather), str(sum(found.values()))


def texts() -> Iterator[tuple[str, ...]]:
    alone = gpt_xp.load("shakespeare", backend="numpy")
    text = "KING HENRY:\nWhat say you to that, my lord? " * 68
    sampled, greedy = alone.generate(PROMPTS, max_tokens=60, **SAMPLED), alone.generate(PROMPTS, max_tokens=60)
    score = alone.score(text)
    for mesh in MESHES:
        model = gpt_xp.load("shakespeare", backend="jax", mesh=mesh)
        found, likeliest = model.generate(PROMPTS, max_tokens=60, **SAMPLED), model.generate(PROMPTS, max_tokens=60)
        pairs = list(zip(found, sampled, strict=True))
        apart = max(float(np.abs(np.subtract(a.logprobs, b.logprobs)).max()) for a, b in pairs)
        scores = float(np.nanmax(np.abs(model.score(text).logprobs - score.logprobs)))
        equal = sum(a.token_ids == b.token_ids for a, b in pairs)
        greedy_equal = sum(a.token_ids == b.token_ids for a, b in zip(likeliest, greedy, strict=True))
        yield (
            mesh,
            f"{equal} of 4",
            f"{greedy_equal} of 4",
            f"{apart:.1e}",
            f"{scores:.1e}",
            f"{held(model.params):.2f}",
        )


def held(tree: Any) -> float:
    """Return the MB that the first device holds of the arrays in a tree."""
    parts = [part for array in jax.tree.leaves(tree) for part in array.addressable_shards]
    return sum(part.data.nbytes for part in parts if part.device == jax.devices()[0]) / 1e6


def trainings() -> Iterator[tuple[str, ...]]:
    alone, *_ = trained(None)
    for mesh in ("data=2", "data=4"):
        losses, share, compiled = trained(mesh)
        yield mesh, f"{np.abs(np.subtract(losses, alone)).max():.1e}", f"{share:.2f}", f"{compiled:.0f} s"


def trained(mesh: str | None) -> tuple[list[float], float, float]:
    settings = TrainingSettings(
        data=("x",), steps=STEPS, warmup=2, batch_size=8, accumulate=2, weight_dropout=0.1, average=0.9, mesh=mesh
    )
    backend = jax_backend(settings)
    program = Program(settings, CONFIG, random_params(CONFIG, 7), backend)
    state, losses, random = program.initial_state(), [], np.random.RandomState(3)
    for step in range(STEPS):
        tokens = random.randint(0, CONFIG.n_vocab, size=(2, 8, 65)).astype(np.int32)
        state, loss = program.train(state, tokens, step)
        losses.append(float(loss))
        if step == 0:
            compiled = backend.compile_seconds()
    total = sum(array.nbytes for array in jax.tree.leaves(state)) / 1e6
    return losses, held(state) / total, backend.compile_seconds() - compiled


if __name__ == "__main__":
    main()
