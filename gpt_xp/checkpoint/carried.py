"""Keep entries and files of a checkpoint that gpt-xp does not use. `save` writes them again, so none is lost."""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# Weights and training states in any format are not copied, because they would contradict the new weights.
_WEIGHTS = re.compile(
    r"pytorch_model.*|checkpoint|hparams\.json|.*\.(safetensors|h5|msgpack|ot|onnx|onnx_data|gguf|tflite|pt|pth|ckpt|npz)"
    r"|.*\.index(\.json)?|.*\.meta|.*\.data-\d+-of-\d+"
)
_TOKENIZER = {"tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "added_tokens.json"} | {
    "tokenizer_config.json",
    "special_tokens_map.json",
}
_WRITTEN_BY_GPT_XP = {CONFIG, GENERATION_CONFIG, "gpt-xp.json", "train.jsonl"}
_MOST_BYTES = 100_000_000  # Larger files are data, and not part of a model.


@dataclass(frozen=True)
class Carried:
    """The entries of `config.json` and `generation_config.json`, and the directory that has the other files."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def copy_files(self, aside: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """Copy the files that gpt-xp does not use to `aside`, except those that `target` has already.

        Weights in other formats, hidden files, folders, and files of more than 100 MB are not copied. The tokenizer
        writes its files itself. Raises `OSError`.
        """
        for path in self._files():
            if not (Path(target) / path.name).exists():
                shutil.copyfile(path, Path(aside) / path.name)

    def _files(self) -> Iterator[Path]:
        if not self.directory.is_dir():
            return  # The directory has been moved or removed.
        for path in sorted(self.directory.iterdir()):
            is_written_elsewhere = path.name in _TOKENIZER | _WRITTEN_BY_GPT_XP or path.name.startswith(".")
            if is_written_elsewhere or _WEIGHTS.fullmatch(path.name):
                continue
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES and os.access(path, os.R_OK):
                yield path
