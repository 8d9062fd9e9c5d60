"""transformers' GPT2LMHeadModel on torch, with its default cache and its default attention."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers


def prepare(folder: Path, dtype: str) -> None:
    """Do nothing, because the checkpoint is read unchanged."""


class Contender:
    """`dtype` is a dtype of torch; "+compile" after it runs the model through torch.compile, with a static cache."""

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.dtype, _, compiled = dtype.partition("+")
        self.device = device
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, self.dtype))
        self.model = model.eval().to(device)
        self.step = torch.compile(self.model, mode="reduce-overhead") if compiled else self.model
        self.compiled = bool(compiled)
        self.caches: dict[tuple[int, int], Any] = {}

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        on = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        settings = {"threads": str(torch.get_num_threads()), "attention": self.model.config._attn_implementation,
                    "torch.compile": str(self.compiled)}  # fmt: skip
        return {"name": "transformers", "version": f"{transformers.__version__}, torch {torch.__version__}",
                "device": on, "dtype": self.dtype, "settings": settings}  # fmt: skip

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Any:
        """Return the logits [n_vocab] after the last token."""
        ids = torch.tensor([tokens], device=self.device)
        return self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].float().cpu().numpy()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, and of each later token of all rows."""
        cache = self._cache(len(prompts), len(prompts[0]) + n_tokens)
        seconds = []
        begin = time.perf_counter()
        # All prompts of a run are of one length; generate() too asks for the last position's logits alone.
        output = self.model(torch.tensor(prompts, device=self.device), use_cache=True, past_key_values=cache,
                            logits_to_keep=1)  # fmt: skip
        for _ in range(n_tokens):
            token = output.logits[:, -1:].argmax(-1)
            token.tolist()  # the caller has it, so the device is done
            now = time.perf_counter()
            seconds.append(now - begin)
            begin = now
            if len(seconds) < n_tokens:
                output = self.step(token.clone(), past_key_values=output.past_key_values, use_cache=True)
        return seconds

    def _cache(self, rows: int, length: int) -> Any:
        """None, for the default cache; or an empty static one, the same each time, for a captured graph knows it."""
        if not self.compiled:
            return None
        if (rows, length) not in self.caches:
            cache = transformers.StaticCache(config=self.model.config, max_cache_len=length)
            self.caches[rows, length] = cache
        self.caches[rows, length].reset()
        return self.caches[rows, length]
