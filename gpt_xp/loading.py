"""`load` and `save`: a model from its files, and back."""

from pathlib import Path

from gpt_xp.backend import Backend
from gpt_xp.checkpoint import checkpoint
from gpt_xp.hub.find import find_model
from gpt_xp.model import Model
from gpt_xp.quantization import check_kind, quantized_backend
from gpt_xp.quantization import quantize as quantize_params
from gpt_xp.registry import get_backend


def load(
    name: str | Path | None = None,
    *,
    backend: str | Backend | None = None,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    mesh: str | None = None,
    hosts: str | None = None,
) -> Model:
    """Return the model called `name`: a directory, a published model such as "124M" or "gpt2", or a bundled one.

    A published model that is not on this machine is fetched, unless `GPT_XP_OFFLINE` is set; `gpt-xp models` lists
    them. None means `GPT_XP_MODEL`, else 124M if it is on this machine, else the bundled model "shakespeare".

    `backend` is a name from `gpt_xp.backends()` (default: `GPT_XP_BACKEND`, else numpy), and `device` one of its
    devices. `dtype` is "float32", "float64", or, on some backends, "float16" or "bfloat16". `threads` limits the
    threads of the CPU. On NumPy the params are mapped from the file, without a copy, if they are stored in `dtype`.

    `quantize` "int8" or "int4" stores the weights in 8 or 4 bits (see `gpt_xp.quantize`): faster, smaller, and a little
    less exact. A model that was saved quantized needs no `quantize`. On the backend native, "w8a8" and "w4a8" round
    activations to 8 bits too: faster, and less exact.

    `mesh` "data=2,model=4" computes on 8 devices of JAX: rows are split over 2, weights over 4 ("auto": rows over all).
    `hosts` "ADDRESS:PORT,COUNT,INDEX" joins COUNT processes, of which this is number INDEX (from 0) and number 0
    listens on that address; processes that Slurm, Open MPI or a TPU pod started are joined without it. All processes
    must make the same calls, and all get the results. Process 0 alone writes files.

    Raises `ModelNotFoundError`, `DownloadError`, `CheckpointError`, `ConfigError`, `TokenizerError`, `BackendError` and
    `DeviceMemoryError`; `SettingError` and `NumericalError` for a model that cannot be quantized in that way.
    """
    check_kind(quantize)
    # What is wrong with the backend is told before anything is fetched.
    chosen = get_backend(backend, device=device, dtype=dtype, threads=threads, mesh=mesh, hosts=hosts)
    if quantize:
        chosen = quantized_backend(chosen, quantize)
    # The params are read as stored, because 16 bits travel faster than 32. The device converts them.
    folder = find_model(name)
    found = checkpoint.read(folder, aligned=not chosen.copies_params)
    if not quantize:
        chosen = chosen.with_copies(found.params, folder)
    params = quantize_params(found.params, quantize) if quantize else found.params
    model = Model(params, found.config, found.tokenizer, chosen)
    model._carried = found.carried
    return model


def save(model: Model, directory: str | Path) -> None:
    """Write `model` to `directory`, as `Model.save` does."""
    model.save(directory)
