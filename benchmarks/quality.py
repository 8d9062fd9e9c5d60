"""Measure the loss of quality by quantization: perplexity and KL divergence from float32, on unseen text.

    python benchmarks/quality.py tinyshakespeare.txt

The text is the file that karpathy/char-rnn publishes as data/tinyshakespeare/input.txt; the bundled model was trained
on its first 90% and is measured on the rest, in pieces of a full context. Any other model and text do too:
`--model 124M --from 0 TEXT`. Prints a Markdown table; KL(float32 || quantized) is in nats for each token, its mean.
"""

import argparse
import math
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure float32 and what is less exact, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--from", dest="begin", type=float, default=0.9, help="where in the text to begin")
    parser.add_argument("--pieces", type=int, default=64, help="how many contexts of text to measure at most")
    parser.add_argument("--backend", default="numpy")
    options = parser.parse_args()

    import numpy as np

    import gpt_xp

    models = {"float32": gpt_xp.load(options.model, backend=options.backend)}
    if options.backend == "native":
        models["float16"] = gpt_xp.load(options.model, backend="native", dtype="float16")
    for kind in ("int8", "int4", *(["w8a8", "w4a8"] if options.backend == "native" else [])):
        models[kind] = gpt_xp.load(options.model, backend=options.backend, quantize=kind)
    tokenizer, n_ctx = models["float32"].tokenizer, models["float32"].config.n_ctx
    assert tokenizer is not None
    text = options.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text[int(options.begin * len(text)) :])
    pieces = [ids[at : at + n_ctx] for at in range(0, len(ids) - n_ctx + 1, n_ctx)][: options.pieces]
    losses: dict[str, list[Any]] = {kind: [] for kind in models}
    divergences: dict[str, list[Any]] = {kind: [] for kind in models}
    for piece in pieces:
        expected = log_softmax(models["float32"].logits(piece))
        for kind, model in models.items():
            found = log_softmax(model.logits(piece))
            losses[kind].append(-found[np.arange(n_ctx - 1), piece[1:]])
            divergences[kind].append((np.exp(expected) * (expected - found)).sum(axis=-1))
    print(f"{options.model}, {len(pieces)} pieces of {n_ctx} tokens of {options.text.name}\n")
    print("| weights | perplexity | against float32 | KL divergence |\n|---|---|---|---|")
    plain = np.mean(losses["float32"])
    for kind in models:
        loss = np.mean(losses[kind])
        print(f"| {kind} | {math.exp(loss):.3f} | {math.exp(loss - plain):.4f} | {np.mean(divergences[kind]):.6f} |")


def log_softmax(logits: Any) -> Any:
    """Return log probabilities over the last axis, in float64."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
