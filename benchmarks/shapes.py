"""Models of a given shape with random weights, for timing."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

HEADER = 14283  # bytes of JSON in openai-community/gpt2's model.safetensors


def random_params(config: Any, seed: int = 0) -> Any:
    """Return float32 params of the given shape: weights of standard deviation 0.02, as GPT-2 is initialized."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n = config.n_embd

    def weight(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def linear(n_in: int, n_out: int) -> Any:
        return {"w": weight(n_in, n_out), "b": weight(n_out)}

    def norm() -> Any:
        return {"g": 1 + weight(n), "b": weight(n)}

    return {
        "wte": weight(config.n_vocab, n),
        "wpe": weight(config.n_ctx, n),
        "blocks": [
            {
                "ln_1": norm(),
                "attn": {"c_attn": linear(n, 3 * n), "c_proj": linear(n, n)},
                "ln_2": norm(),
                "mlp": {"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)},
            }
            for _ in range(config.n_layer)
        ],
        "ln_f": norm(),
    }


def trained_size_params(config: Any, seed: int = 0) -> Any:
    """Return random params whose activations are about as large as those of the trained GPT-2.

    Trained ones have a few dimensions of the residual stream at some thousands, from the first block to the last, and
    logits of -100 or so. There, float32 has the fewest digits. The sizes of the embeddings are those of 124M (standard
    deviations 0.14 and 0.12).
    """
    import numpy as np

    params = random_params(config, seed)
    params["wte"] *= np.float32(7)
    params["wpe"] *= np.float32(6)
    for i, block in enumerate(params["blocks"]):
        block["attn"]["c_attn"]["w"] *= np.float32(
            18 if i else 6
        )  # After the first, norms divide by the large numbers.
        block["mlp"]["c_fc"]["w"] *= np.float32(6)
        block["mlp"]["c_proj"]["w"] *= np.float32(4)
        for norm in ("ln_1", "ln_2"):
            block[norm]["g"] *= np.float32(0.3)
    large = [138, 378, 447]  # those of 124M
    params["blocks"][0]["mlp"]["c_proj"]["b"][large] += np.float32([2800, -700, 900])
    params["blocks"][-1]["mlp"]["c_proj"]["b"][large] -= np.float32([2600, -650, 800])
    params["ln_f"]["g"] *= np.float32(8)
    return params


def tokenizer(n_vocab: int) -> Any:
    """Return a tokenizer that has a token for every id: the bytes, pairs of them, and the end token."""
    from gpt_xp.tokenizer.bpe import Tokenizer
    from gpt_xp.tokenizer.words import CHARACTER_OF_BYTE, EOS

    pairs = list(itertools.islice(itertools.product(CHARACTER_OF_BYTE, repeat=2), n_vocab - 257))
    tokens = [*CHARACTER_OF_BYTE, *map("".join, pairs), EOS]
    return Tokenizer({token: id for id, token in enumerate(tokens)}, pairs)


def write_published(folder: Path, config: Any, params: Any = None) -> None:
    """Write params (default: random ones) to `folder` as the published checkpoints are, and a tokenizer of that size.

    Their header is 14283 bytes long, so that no float32 in them lies at a multiple of 4.
    """
    import gpt_xp

    gpt_xp.Model(params or random_params(config), config, tokenizer(config.n_vocab), backend="numpy").save(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"transformer.", b"").rstrip()
    header = header.ljust(max(HEADER, len(header) + 1 - len(header) % 2))  # odd, for larger models too
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def published_params(config: Any) -> Any:
    """Return random params as `gpt_xp.load` reads them from a file like the published ones."""
    from gpt_xp.checkpoint.weights import read_params

    with tempfile.TemporaryDirectory() as directory:
        write_published(Path(directory), config)
        return read_params(directory, config)
