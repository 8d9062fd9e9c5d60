"""The process that runs one backend of a comparison: `python -m gpt_xp compare-backend JOB`.

JOB is a JSON file. The results are written to its folder: `result.json`, and for each prompt `layers-0.npy`
[n_layer + 2, n_seq, n_embd] (the embedding, each block, the last norm) and `logits-0.npy` [n_seq, n_vocab].
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp import json_text
from gpt_xp.backend import get_backend
from gpt_xp.comparison.job import MODES
from gpt_xp.config import GPT2Config
from gpt_xp.errors import NumericalError
from gpt_xp.generation.decoder import PIECE, Engine
from gpt_xp.generation.results import Prompt, Stats
from gpt_xp.generation.sampling import Sampling
from gpt_xp.kv_cache import KVCache
from gpt_xp.model import Model, load
from gpt_xp.transformer import at_least_float32, layer_norm, residual_stream, unembed
from gpt_xp.types import Array, Namespace, Params

DECODED_TOKENS = 5  # tokens at the end of each prompt that are decoded one by one, so that this is compared too


def work(job_file: Path) -> None:
    """Do the job, and write the results to its folder."""
    job = json_text.parse(job_file.read_bytes())
    folder = job_file.parent
    backend = get_backend(job["backend"], device=job["device"], dtype=job["dtype"], threads=job["threads"])
    backend.keep_compiled()  # The command owns this process, so it may change this setting of JAX.
    model = load(job["model"], backend=backend)
    prompts: list[list[int]] = job["prompts"]
    result: dict[str, Any] = {
        "backend": backend.name,
        "version": backend.version,
        "device": backend.device,
        "dtype": backend.dtype,
        "settings": backend.settings(),
        "problem": None,
    }
    try:
        # The speed is measured first, because compiling takes place only once.
        result["speed"] = measure(model, max(prompts, key=len), job["max_tokens"])
        result["generation"] = {mode: generate(model, prompts, job, mode) for mode in MODES}
    except NumericalError as error:
        result["problem"] = str(error)  # The layers, which are computed below, show where it begins.
    for number, ids in enumerate(prompts):
        layers, logits = trace(model, ids)
        np.save(folder / f"layers-{number}.npy", layers)
        np.save(folder / f"logits-{number}.npy", logits)
    result["peak_memory_bytes"] = backend.peak_memory()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


# --- layers and logits ------------------------------------------------------------------------------------------------


def traced(
    tokens: Array, params: Params, cache: KVCache, count: int | Array, config: GPT2Config, window: int, xp: Namespace
) -> tuple[list[Array], Array, KVCache]:
    """Return the residual stream after each layer, the logits, and the cache; arrays in at least float32.

    It returns more than a step does, and by the order of its arguments backends do not take it for one.
    """
    seen: list[Array] = []
    after: KVCache | None = cache
    for x, after in residual_stream(params, tokens, config, cache, window, xp):  # noqa: B007
        seen.append(x)
    seen.append(layer_norm(seen[-1], **params["ln_f"], xp=xp))
    logits = unembed(seen[-1], params["wte"], xp)
    assert after is not None
    wide = [at_least_float32(each, xp) for each in (*seen, logits)]
    return wide[:-1], wide[-1], after._replace(position=cache.position + count)


def trace(model: Model, ids: list[int]) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Return layers and logits of a prompt, computed with a cache: in chunks, and the last tokens one at a time."""
    engine, backend = model._engine, model.backend
    step = backend.compile(traced, static=("config", "window", "xp"), donate=("cache",))
    tokens, cache, total = engine._begin([ids], n_new=0)
    first = max(total - DECODED_TOKENS, 1)
    layers, logits = [], []
    for begin in [*range(0, first, PIECE), *range(first, total)]:
        if begin < first:
            piece, cache, window = engine._piece(tokens[:, :first], begin, cache)
            count = min(PIECE, first - begin)
        else:
            piece, count = backend.asarray(tokens[:, begin : begin + 1]), 1
            cache, window = engine._fitting(cache, begin + 1)
        seen, scores, cache = step(piece, model.params, cache, count, config=model.config, window=window, xp=backend.xp)
        layers.append(np.stack([backend.to_numpy(each)[:count] for each in seen]))
        logits.append(backend.to_numpy(scores)[:count])
    return np.concatenate(layers, axis=1), np.concatenate(logits)


# --- generation -------------------------------------------------------------------------------------------------------


def generate(model: Model, prompts: list[list[int]], job: dict[str, Any], mode: str) -> dict[str, Any]:
    """Continue each prompt twice: freely, and forced to follow the reference's text where it is known."""
    settings = {**MODES[mode], "seed": job["seed"], "max_tokens": job["max_tokens"], "ignore_eos": True}
    free = [model.generate(ids, **settings) for ids in prompts]
    expected = job["expected"][mode] if job["expected"] else [out.token_ids for out in free]
    sampling = Sampling(**MODES[mode], seed=job["seed"])
    forced = [follow(model._engine, ids, row, sampling) for ids, row in zip(prompts, expected, strict=True)]
    return {"free": [out.token_ids for out in free], "forced": forced}


def follow(engine: Engine, ids: list[int], expected: list[int], sampling: Sampling) -> list[tuple[int, float]]:
    """Return the token and margin that would be chosen at each step; the text goes on with `expected`."""
    row = engine._row(Prompt(ids), len(expected), (), ignore_eos=True)
    logits, cache, used = engine.prefill([ids], len(expected))
    choices = []
    for step, token in enumerate(expected):
        choice = engine._sample(logits, [row], sampling, step)
        choices.append((int(choice.token[0]), float(choice.margin[0])))
        row.take(token, 0.0, 0.0)
        if step + 1 < len(expected):
            logits, cache, used = engine.decode([token], cache, used)
    return choices


# --- speed ------------------------------------------------------------------------------------------------------------


def measure(model: Model, ids: list[int], max_tokens: int) -> dict[str, Any]:
    """Return the time to the first token in a new process, and the rates after everything is compiled."""
    new: Stats = model.generate(ids, max_tokens=max_tokens, ignore_eos=True).stats
    warm: Stats = model.generate(ids, max_tokens=max_tokens, ignore_eos=True).stats
    return {
        "time_to_first_token": new.time_to_first_token,
        "compile_seconds": new.compile_seconds,
        "prefill_tokens_per_second": warm.prefill_tokens_per_second,
        "decode_tokens_per_second": warm.decode_tokens_per_second,
        "prompt_tokens": warm.prompt_tokens,
        "generated_tokens": warm.generated_tokens,
    }
