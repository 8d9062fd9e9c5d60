"""GPT-2, written once against the Python array API standard.

    model = gpt_xp.load(backend="numpy")
    print(model.generate("ROMEO:").text)

`gpt_xp.gpt2` and `gpt_xp.lm_loss` are the model as pure functions, for any array library.
"""

from importlib import import_module

from gpt_xp.version import __version__ as __version__

TYPE_CHECKING = False  # Type checkers take it for true. To import it from `typing` would take longer.

if TYPE_CHECKING:
    from gpt_xp.backend import Backend, BackendInfo
    from gpt_xp.benchmark.models import bench
    from gpt_xp.benchmark.results import Benchmark
    from gpt_xp.comparison.driver import compare
    from gpt_xp.comparison.results import Comparison
    from gpt_xp.config import SIZES, GPT2Config
    from gpt_xp.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DeviceMemoryError,
        DownloadError,
        GptXpError,
        GptXpWarning,
        ModelNotFoundError,
        NumericalError,
        PromptError,
        SettingError,
        TextError,
        TokenizerError,
    )
    from gpt_xp.generation.results import Generation, Piece, Stats
    from gpt_xp.inspection.results import Look
    from gpt_xp.inspection.trace import trace
    from gpt_xp.jobs.run import bulk
    from gpt_xp.jobs.status import BulkStatus
    from gpt_xp.kv_cache import KVCache, new_cache
    from gpt_xp.loading import load, save
    from gpt_xp.model import Model
    from gpt_xp.picogpt import load_encoder_hparams_and_params, shape_tree
    from gpt_xp.quantization import quantize
    from gpt_xp.registry import backends, get_backend, with_parts
    from gpt_xp.scoring.rank import RankedChoice
    from gpt_xp.scoring.score import Score
    from gpt_xp.settings import GenerationSettings
    from gpt_xp.tokenizer.bpe import Tokenizer
    from gpt_xp.tokenizer.training import train_tokenizer
    from gpt_xp.training.log import Evaluation, Training
    from gpt_xp.training.loop import train
    from gpt_xp.transformer import gpt2, gpt2_with_cache, hidden_states, lm_loss, unembed

__all__ = [
    "SIZES",
    "Backend",
    "BackendError",
    "BackendInfo",
    "Benchmark",
    "BulkStatus",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DeviceMemoryError",
    "DownloadError",
    "Evaluation",
    "GPT2Config",
    "Generation",
    "GenerationSettings",
    "GptXpError",
    "GptXpWarning",
    "KVCache",
    "Look",
    "Model",
    "ModelNotFoundError",
    "NumericalError",
    "Piece",
    "PromptError",
    "RankedChoice",
    "Score",
    "SettingError",
    "Stats",
    "TextError",
    "Tokenizer",
    "TokenizerError",
    "Training",
    "backends",
    "bench",
    "bulk",
    "compare",
    "get_backend",
    "gpt2",
    "gpt2_with_cache",
    "hidden_states",
    "lm_loss",
    "load",
    "load_encoder_hparams_and_params",
    "new_cache",
    "quantize",
    "save",
    "shape_tree",
    "trace",
    "train",
    "train_tokenizer",
    "unembed",
    "with_parts",
]

# The modules of the public names. Each is imported when one of its names is first asked for: `import gpt_xp` takes a
# few milliseconds, and the command can prepare for Ctrl-C before NumPy is imported.
_NAMES_OF = {
    "model": ("Model",),
    "loading": ("load", "save"),
    "backend": ("Backend", "BackendInfo"),
    "kv_cache": ("KVCache", "new_cache"),
    "benchmark.results": ("Benchmark",),
    "benchmark.models": ("bench",),
    "comparison.driver": ("compare",),
    "comparison.results": ("Comparison",),
    "config": ("SIZES", "GPT2Config"),
    "errors": (
        "BackendError",
        "CheckpointError",
        "ConfigError",
        "DeviceMemoryError",
        "DownloadError",
        "GptXpError",
        "GptXpWarning",
        "ModelNotFoundError",
        "NumericalError",
        "PromptError",
        "SettingError",
        "TextError",
        "TokenizerError",
    ),
    "inspection.results": ("Look",),
    "inspection.trace": ("trace",),
    "jobs.run": ("bulk",),
    "jobs.status": ("BulkStatus",),
    "transformer": ("gpt2", "gpt2_with_cache", "hidden_states", "lm_loss", "unembed"),
    "picogpt": ("load_encoder_hparams_and_params", "shape_tree"),
    "quantization": ("quantize",),
    "registry": ("backends", "get_backend", "with_parts"),
    "generation.results": ("Generation", "Piece", "Stats"),
    "scoring.rank": ("RankedChoice",),
    "scoring.score": ("Score",),
    "settings": ("GenerationSettings",),
    "tokenizer.bpe": ("Tokenizer",),
    "tokenizer.training": ("train_tokenizer",),
    "training.log": ("Evaluation", "Training"),
    "training.loop": ("train",),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

if not TYPE_CHECKING:  # A type checker that sees `__getattr__` accepts any name.

    def __getattr__(name: str) -> object:
        """Return a public name or a submodule, and import its module first."""
        if name in _MODULE_OF:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        from importlib.util import find_spec  # It is not imported above because it imports many other modules.

        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
