"""llama.cpp through llama-cpp-python's low-level interface: llama_decode, and NumPy's argmax over its logits."""

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from gpt_xp.checkpoint.config_json import read_config
from gpt_xp.checkpoint.weights import read_params

FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
# Tokens computed together: llama.cpp's default, and with flash attention the whole prompt, each the faster.
MICRO_BATCH = {False: 512, True: 1024}


def prepare(folder: Path, dtype: str) -> None:
    """Write a GGUF file of float32 weights, and from it one of `dtype` by llama.cpp's own quantization."""
    plain, target = _path(folder, "F32"), _path(folder, dtype)
    temporary = target.with_suffix(".tmp")
    if not plain.exists():
        _write_gguf(temporary, folder)
        temporary.rename(plain)
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[dtype.removesuffix("+flash")]
        _quiet()
        if llama_cpp.llama_model_quantize(bytes(plain), bytes(temporary), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not quantize {plain} to {dtype}")
        temporary.rename(target)


def _path(folder: Path, dtype: str) -> Path:
    return folder / f"llama.cpp-{dtype.removesuffix('+flash')}.gguf"


def _write_gguf(path: Path, folder: Path) -> None:
    """Architecture "gpt2" of the GGUF format; it stores a linear layer as [n_out, n_in]."""
    import gguf

    config = read_config(folder)
    params = read_params(folder, config)
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.n_vocab)

    def add(name: str, params: Any) -> None:
        if "w" in params:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(np.asarray(params["w"]).T))
        else:
            writer.add_tensor(f"{name}.weight", np.array(params["g"]))
        writer.add_tensor(f"{name}.bias", np.array(params["b"]))

    writer.add_tensor("token_embd.weight", np.array(params["wte"]))
    writer.add_tensor("position_embd.weight", np.array(params["wpe"]))
    for i, block in enumerate(params["blocks"]):
        add(f"blk.{i}.attn_norm", block["ln_1"])
        add(f"blk.{i}.attn_qkv", block["attn"]["c_attn"])
        add(f"blk.{i}.attn_output", block["attn"]["c_proj"])
        add(f"blk.{i}.ffn_norm", block["ln_2"])
        add(f"blk.{i}.ffn_up", block["mlp"]["c_fc"])
        add(f"blk.{i}.ffn_down", block["mlp"]["c_proj"])
    add("output_norm", params["ln_f"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


def _quiet() -> None:
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))


class Contender:
    """`dtype` is F32, F16, Q8_0 or Q4_0, with "+flash" for flash attention.

    The cache is in float32 for F32, and else in float16, the default. Even in F32 the GELU is read from a table of
    float16, so that logits agree to 3 or 4 digits only.
    """

    def __init__(self, folder: Path, dtype: str, threads: int, device: str) -> None:
        _quiet()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1 if device == "cuda" else 0
        self.model = llama_cpp.llama_model_load_from_file(bytes(_path(folder, dtype)), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {_path(folder, dtype)}")
        config = read_config(folder)
        self.n_vocab, self.n_ctx = config.n_vocab, config.n_ctx
        self.dtype, _, flash = dtype.partition("+")
        self.flash, self.threads, self.device = bool(flash), threads, device
        self.rows, self.context = 0, None

    def describe(self) -> dict[str, Any]:
        """Return name, version, device, dtype and settings."""
        settings = {"threads": str(self.threads), "cache": "float32" if self.dtype == "F32" else "float16",
                    "flash attention": str(self.flash), "tokens together": str(MICRO_BATCH[self.flash])}  # fmt: skip
        return {"name": "llama.cpp", "version": f"llama-cpp-python {llama_cpp.__version__}", "device": self.device,
                "dtype": self.dtype, "settings": settings}  # fmt: skip

    def logits(self, tokens: list[int]) -> Any:
        """Return the logits [n_vocab] after the last token."""
        self._begin([tokens])
        return self._logits(1)[0].copy()

    def run(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """Return the seconds of prefill, and of each later token of all rows."""
        self._open(len(prompts))
        begin = time.perf_counter()
        batch, position = self._begin(prompts), len(prompts[0])
        seconds = []
        for step in range(n_tokens):
            tokens = self._logits(len(prompts)).argmax(axis=-1)
            now = time.perf_counter()
            seconds.append(now - begin)
            begin = now
            if step + 1 < n_tokens:
                self._fill(batch, [(int(token), position + step, row, True) for row, token in enumerate(tokens)])
                self._decode(batch)
        return seconds

    def _open(self, rows: int) -> None:
        """A context with room for `rows` sequences; making one is not timed."""
        if rows == self.rows:
            return
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * self.n_ctx, rows
        params.n_batch, params.n_ubatch = rows * self.n_ctx, MICRO_BATCH[self.flash]
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(self.flash)
        if self.dtype == "F32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(rows * self.n_ctx, 0, 1)
        self.rows = rows

    def _begin(self, prompts: list[list[int]]) -> Any:
        """Forget everything, and run the prompts."""
        self._open(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        last = len(prompts[0]) - 1
        entries = [
            (token, position, row, position == last)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        self._fill(self.batch, entries)
        self._decode(self.batch)
        return self.batch

    def _fill(self, batch: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row

    def _decode(self, batch: Any) -> None:
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _logits(self, rows: int) -> Any:
        """The logits that were asked for, [rows, n_vocab]; this waits until they are computed."""
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab))
