"""Make the goldens: what transformers computes, in float64, for the models of `small_models.py`.

    pip install -e '.[dev,oracle]'
    python tests/goldens/make_goldens.py

Writes logits.npz (logits, losses and one gradient of each small model) and shakespeare.json (greedy text of the
bundled model). `tests/test_oracle.py` computes them again and compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "support"))

PROMPT, MAX_TOKENS = "ROMEO:\nWhat light", 100
POSITIONS = slice(None, None, 3)  # of the logits, every third is kept


def transformers_model(config: Any, params: Any) -> Any:
    """Return transformers' GPT-2 with these weights, in float64, set by name and by no code of gpt-xp."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.n_vocab,
            n_positions=config.n_ctx,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_layer=config.n_layer,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
    )
    model = model.double().eval()

    def fill(module: Any, values: Any) -> None:
        names = {"w": "weight", "g": "weight", "b": "bias"}
        for key, value in values.items():
            if key in names and not isinstance(value, dict):
                getattr(module, names[key]).data = torch.tensor(value)
            else:
                fill(getattr(module, key), value)

    gpt = model.transformer
    gpt.wte.weight.data, gpt.wpe.weight.data = torch.tensor(params["wte"]), torch.tensor(params["wpe"])
    model.tie_weights()
    fill(gpt.ln_f, params["ln_f"])
    for module, block in zip(gpt.h, params["blocks"], strict=True):
        fill(module, block)
    return model


def golden(name: str) -> dict[str, np.ndarray]:
    """Return logits, loss and the gradient of the loss by the first block's c_attn weight."""
    import torch
    from small_models import CONFIGS, small_params, small_tokens

    tokens = torch.tensor(small_tokens(name), dtype=torch.long)
    model = transformers_model(CONFIGS[name], small_params(name))
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return {
        f"{name}/logits": output.logits.detach().numpy()[:, POSITIONS],
        f"{name}/loss": output.loss.detach().numpy(),
        f"{name}/gradient": model.transformer.h[0].attn.c_attn.weight.grad.numpy()[:, ::3],
    }


def shakespeare() -> dict[str, Any]:
    """Return transformers' greedy continuation of PROMPT with the bundled model."""
    import torch
    import transformers

    directory = ROOT / "gpt_xp" / "models" / "shakespeare"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    new = out[0, ids.shape[1] :].tolist()
    return {"prompt": PROMPT, "prompt_ids": ids[0].tolist(), "token_ids": new, "text": tokenizer.decode(new)}


def main() -> None:
    from small_models import CONFIGS

    arrays = {key: value for name in CONFIGS for key, value in golden(name).items()}
    np.savez_compressed(HERE / "logits.npz", **arrays)
    (HERE / "shakespeare.json").write_text(json.dumps(shakespeare(), indent=1) + "\n")


if __name__ == "__main__":
    main()
