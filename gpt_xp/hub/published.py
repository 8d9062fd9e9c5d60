"""List the published GPT-2s: their names and servers, and the sizes and digests of their files."""

from dataclasses import dataclass, replace
from pathlib import Path

from gpt_xp.config import SIZES, GPT2Config
from gpt_xp.errors import DownloadError, ModelNotFoundError

HUB = "https://huggingface.co"  # HF_ENDPOINT replaces it.
BUCKET = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # from openai/gpt-2 `download_model.py`

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPENAI_WEIGHTS = "model.ckpt.data-00000-of-00001"
# Files are fetched in this order. Small ones are first. The index is last, because it completes a checkpoint.
HUB_FILES = (CONFIG, "vocab.json", "merges.txt", WEIGHTS)
OPENAI_FILES = (
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    "checkpoint",
    "model.ckpt.meta",
    OPENAI_WEIGHTS,
    "model.ckpt.index",
)


@dataclass(frozen=True)
class Pin:
    """The size and the digest ("sha256:..." or "md5:...") that a file must have, where they are known."""

    n_bytes: int | None = None
    digest: str | None = None


UNKNOWN = Pin()
# All models have the same vocabulary.
_VOCABULARY = {
    "vocab.json": Pin(1042301, "sha256:196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": Pin(456318, "sha256:1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}


@dataclass(frozen=True)
class Published:
    """One published model. The Hub's files are those of `revision`, and OpenAI's are in the bucket's folder `name`."""

    name: str
    aliases: tuple[str, ...]
    config: GPT2Config
    repo: str
    revision: str
    weights: Pin = UNKNOWN
    openai_weights: Pin = UNKNOWN
    in_bucket: bool = True

    def pin(self, file: str) -> Pin:
        """Return the pin of one of the files."""
        return {WEIGHTS: self.weights, OPENAI_WEIGHTS: self.openai_weights, **_VOCABULARY}.get(file, UNKNOWN)

    def check_config(self, found: GPT2Config, folder: Path) -> None:
        """Raise `DownloadError` where the config that was fetched into `folder` has other sizes."""
        if replace(found, eos_token_id=self.config.eos_token_id, bos_token_id=self.config.bos_token_id) != self.config:
            raise DownloadError(
                f"what was fetched for {self.name} into {folder} is another model: {found}; ask its source"
            )

    def check_in_bucket(self) -> None:
        """Raise `ModelNotFoundError` for a model that OpenAI has not published."""
        if not self.in_bucket:
            raise ModelNotFoundError(f"{self.name} is not in OpenAI's bucket; the Hub has it (--source hub)")


def _openai(
    name: str, suffix: str, revision: str, *old_names: str, weights: Pin = UNKNOWN, openai_weights: Pin = UNKNOWN
) -> Published:
    repo = f"openai-community/gpt2{suffix}"
    return Published(name, (f"gpt2{suffix}", *old_names, repo), SIZES[name], repo, revision, weights, openai_weights)


MODELS = {
    model.name: model
    for model in (
        _openai(
            "124M",
            "",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            "117M",
            weights=Pin(548105171, "sha256:248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
            openai_weights=Pin(497759232, "md5:f48b9cf1a525a603be52258f69bf9162"),
        ),
        _openai(
            "355M",
            "-medium",
            "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
            "345M",
            weights=Pin(1519984962, "sha256:fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
        ),
        _openai("774M", "-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
        _openai(
            "1558M",
            "-xl",
            "15ea56dee5df4983c59b2538573817e1667135e2",
            weights=Pin(None, "sha256:0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
        ),
        Published(
            "distilgpt2",
            ("distilbert/distilgpt2",),
            GPT2Config(n_embd=768, n_head=12, n_layer=6, eos_token_id=50256),
            "distilbert/distilgpt2",
            "2290a62682d06624634c1f46a6ad5be0f47f38aa",
            weights=Pin(352824413, "sha256:e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b"),
            in_bucket=False,
        ),
    )
}


def find_published(name: str) -> Published | None:
    """Return the model that `name` stands for, an alias or a name in any case; None if there is none."""
    for model in MODELS.values():
        if name.lower() in {each.lower() for each in (model.name, *model.aliases)}:
            return model
    return None
