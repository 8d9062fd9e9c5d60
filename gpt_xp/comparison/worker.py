"""The process that runs one backend of a comparison: `python -m gpt_xp compare-backend JOB`.

JOB is a JSON file. The results are written to its folder: `result.json`, and for each prompt `layers-0.npy`
[n_layer + 2, n_seq, n_embd] (the embedding, each block, the last norm) and `logits-0.npy` [n_seq, n_vocab].
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt_xp import json_text
from gpt_xp.arrays import at_least_float32
from gpt_xp.comparison.job import MODES
from gpt_xp.config import GPT2Config
from gpt_xp.errors import NumericalError
from gpt_xp.generation.choosing import Choosing
from gpt_xp.generation.results import Stats
from gpt_xp.generation.rows import Prompt
from gpt_xp.inspection.trace import Seen, trace_names
from gpt_xp.kv_cache import KVCache
from gpt_xp.loading import load
from gpt_xp.model import Model
from gpt_xp.parts import ReplacedParts
from gpt_xp.registry import get_backend
from gpt_xp.settings import GenerationSettings
from gpt_xp.transformer import hidden_states, unembed
from gpt_xp.types import Array, Namespace, Params

TRACED_CHUNK_TOKENS = 128  # tokens whose logits are computed together, on every backend
DECODED_TOKENS = 5  # tokens at the end of each prompt that are decoded one by one, so that this is compared too


def work(job_file: Path) -> None:
    """Do the job, and write the results to its folder."""
    job = json_text.parse(job_file.read_bytes())
    folder = job_file.parent
    backend = get_backend(job["backend"], device=job["device"], dtype=job["dtype"], threads=job["threads"])
    backend = backend.replace(waits_for_compiling=True)
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
        "generation": {},
    }
    if job["max_tokens"]:
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
    params: Params, tokens: Array, cache: KVCache | None, count: int | Array, config: GPT2Config, xp: Namespace
) -> tuple[list[Array], Array, KVCache | None]:
    """Return the embeddings and the output of each layer and of the last norm, the logits, and the cache, if any.

    The arrays are [n_seq, n_embd] and [n_seq, n_vocab], in at least float32, of a batch of one row.
    """
    names = trace_names(config, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
    seen = Seen(tokens.shape[1:], names)  # of the one row
    x, after = hidden_states(params, tokens, config, cache, ReplacedParts(xp, seen.parts()))
    layers = [*(seen.found[name] for name in names), x[0, ...]]
    logits = at_least_float32(unembed(layers[-1], params["wte"], xp), xp)
    if cache is not None and after is not None:
        after = after._replace(position=cache.position + count)
    return [at_least_float32(each, xp) for each in layers], logits, after


def trace(model: Model, ids: list[int]) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Return layers and logits of a prompt, computed with a cache: in chunks, and the last tokens one at a time."""
    decoder, backend = model._decoder, model.backend
    step = backend.compile(traced, static=("config", "xp"), donate=("cache",))
    tokens, cache = decoder.start([ids])
    first = max(len(ids) - DECODED_TOKENS, 1)
    layers, logits = [], []
    while (begin := cache.position) < len(ids):
        if begin < first:
            chunk, cache = decoder.next_chunk(tokens[:, :first], cache, TRACED_CHUNK_TOKENS)
            count = min(TRACED_CHUNK_TOKENS, first - begin)
        else:
            chunk, count = backend.asarray(tokens[:, begin : begin + 1]), 1
            cache = decoder.grow_cache(cache, begin + 1)
        seen, scores, cache = step(model.params, chunk, cache, count, config=model.config, xp=backend.xp)
        cache = cache._replace(position=begin + count)
        layers.append(np.stack([backend.to_numpy(each)[:count] for each in seen]))
        logits.append(backend.to_numpy(scores)[:count])
    return np.concatenate(layers, axis=1), np.concatenate(logits)


# --- generation -------------------------------------------------------------------------------------------------------


def generate(model: Model, prompts: list[list[int]], job: dict[str, Any], mode: str) -> dict[str, Any]:
    """Continue each prompt twice: freely, and forced to follow the reference's text where it is known."""
    settings = {**MODES[mode], "seed": job["seed"], "max_tokens": job["max_tokens"], "ignore_eos": True}
    free = [model.generate(ids, **settings) for ids in prompts]
    expected = job["expected"][mode] if job["expected"] else [out.token_ids for out in free]
    choosing = GenerationSettings(**MODES[mode], seed=job["seed"])
    forced = [follow(model, ids, row, choosing) for ids, row in zip(prompts, expected, strict=True)]
    return {"free": [out.token_ids for out in free], "forced": forced}


def follow(model: Model, ids: list[int], expected: list[int], settings: GenerationSettings) -> list[tuple[int, float]]:
    """Return the token and margin that would be chosen at each step; the text goes on with `expected`."""
    prompt = Prompt(ids, seed=settings.seeds(1)[0])
    decoder, choosing = model._decoder, Choosing(model._generator.chooser, [prompt], settings)
    logits, cache = decoder.prefill([ids])
    choices = []
    for step, token in enumerate(expected):
        choice = choosing.choose(logits, step)
        choices.append((int(choice.token[0]), float(choice.margin[0])))
        choosing.add([token])
        if step + 1 < len(expected):
            logits, cache = decoder.decode([token], cache)
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
