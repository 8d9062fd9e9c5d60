"""Make tokenizers.json: what Hugging Face's `tokenizers` learns from a few small texts.

    pip install -e '.[dev,oracle]'
    python tests/goldens/make_tokenizers.py

`tests/tokenizer/test_tokenizer_training.py` compares with it, and (with `-m oracle`) makes it again.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "tokenizers.json"
EOS = "<|endoftext|>"

PROSE = """\
The lighthouse keeper counts the ships. Six ships, and then sixteen; he'll count them again, because he doesn't trust
the fog, and the fog doesn't trust him. "They're late," he says. "I'd have sailed at three, and I've sailed at two."

    for ship in ships:
        if ship.late and not ship.lost:
            count += 1      # 1, 2, 3, ... 1999, 2000

Der Leuchtturmwärter zählt die Schiffe: sechs Schiffe, dann sechzehn. Le gardien du phare compte les bateaux — déjà
seize ! Сторож считает корабли: шесть, потом шестнадцать. 灯台守は船を数える。六隻、そして十六隻。🚢🚢🚢 👩‍🚒
\tThe\r\nship's\xa0bell   rings,  rings,   rings.  It's six o'clock.\n\n\n  'Tis late; 'twas later.
"""
CASES: dict[str, tuple[Sequence[str], int, Sequence[str]]] = {
    "prose": ([PROSE], 560, [EOS]),
    "all pairs as frequent as each other": (["ab ba cb bc ac ca " * 3], 266, [EOS]),
    "runs of one character": (["-- --- ---- ----- ------ ------- -----------------\n" * 2], 266, [EOS]),
    "bytes alone": ([PROSE], 257, [EOS]),
    "other special tokens, in the text too": ([PROSE, "<|user|>" * 9], 300, ["<|user|>", EOS, "<|машина|>"]),
    "no special token": ([PROSE], 300, []),
    "words end where texts do": (["over", "flow", "overflow", "o", "", "ver"], 263, [EOS]),
    "all that a text has": (["six ships sail, sixty ships sink"], 273, [EOS]),
}


def learn(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> dict[str, Any]:
    """Return the vocabulary, as a list by id, and the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {"tokens": sorted(model["vocab"], key=model["vocab"].get), "merges": merges}


def goldens() -> dict[str, Any]:
    """Return what is learned in every case."""
    return {
        name: {"texts": texts, "vocab_size": size, "special_tokens": special, **learn(texts, size, special)}
        for name, (texts, size, special) in CASES.items()
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(goldens(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
