"""CTranslate2's Generator: greedy, the prompt forwarded at once, the time of each token taken in its callback."""

import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params


def prepare(folder: Path, dtype: str) -> None:
    """Write the model in CTranslate2's format, float32 or quantized as its own converter does.

    The specification is filled in by hand: the names of tokens do not matter here, so their numbers are their names.
    """
    target = folder / f"ctranslate2-{dtype}"
    if target.exists():
        return
    config = read_config(folder)
    params = read_params(folder, config)
    spec = TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.array(params["wte"])
    decoder.position_encodings.encodings = np.array(params["wpe"])
    decoder.projection.weight = decoder.embeddings.weight
    _norm(decoder.layer_norm, params["ln_f"])
    for layer, block in zip(decoder.layer, params["blocks"], strict=True):
        _norm(layer.self_attention.layer_norm, block["ln_1"])
        _linear(layer.self_attention.linear[0], block["attn"]["c_attn"])
        _linear(layer.self_attention.linear[1], block["attn"]["c_proj"])
        _norm(layer.ffn.layer_norm, block["ln_2"])
        _linear(layer.ffn.linear_0, block["mlp"]["c_fc"])
        _linear(layer.ffn.linear_1, block["mlp"]["c_proj"])
    spec.register_vocabulary([str(token) for token in range(config.n_vocab)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(config.n_vocab - 1)
    spec.validate()
    spec.optimize(quantization=dtype)
    temporary = target.with_suffix(".tmp")
    temporary.mkdir()
    spec.save(str(temporary))
    temporary.rename(target)


def _norm(spec: Any, params: Any) -> None:
    spec.gamma, spec.beta = np.array(params["g"]), np.array(params["b"])


def _linear(spec: Any, params: Any) -> None:
    # Copies: its quantization works in place.
    spec.weight, spec.bias = np.array(np.asarray(params["w"]).T, order="C"), np.array(params["b"])


class Contender:
    """`dtype` is a compute type of CTranslate2: float32, int8 (on the CPU, its int8_float32)."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        path = folder / f"ctranslate2-{dtype}"
        self.generator = ctranslate2.Generator(
            str(path), device, compute_type=dtype, inter_threads=1, intra_threads=threads
        )
        self.threads, self.device = threads, device

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        return {"name": "CTranslate2", "version": ctranslate2.__version__, "device": self.device,
                "dtype": self.generator.compute_type, "settings": {"threads": str(self.threads)}}  # fmt: skip

    def logits(self, tokens: list[int]) -> Any:
        """Return the logits [n_vocab] after the last token."""
        result = self._generate([tokens], 1, return_logits_vocab=True)[0]
        return np.asarray(result.logits[0][0], dtype=np.float32)

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, and of each later token of all rows."""
        times = [0.0] * n_tokens

        def took(step: Any) -> bool:  # once for each row and token: the last row's call is the token's time
            times[step.step] = time.perf_counter()
            return False

        begin = time.perf_counter()
        results = self._generate(prompts, n_tokens, callback=took)
        assert all(len(result.sequences_ids[0]) == n_tokens for result in results)
        return np.diff([begin, *times]).tolist()

    def _generate(self, prompts: list[list[int]], n_tokens: int, **options: Any) -> Any:
        named = [[str(token) for token in prompt] for prompt in prompts]
        return self.generator.generate_batch(
            named, max_length=n_tokens, end_token=[], include_prompt_in_result=False, **options
        )
