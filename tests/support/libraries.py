"""The array libraries that the tests run on, and those that must be installed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gpt_xp_backends import jax_backend

from gpt_xp import Backend
from gpt_xp.errors import BackendError
from gpt_xp.generation.sampling import Choice
from gpt_xp.quantization import quantized_backend
from gpt_xp.registry import get_backend

BACKENDS = ("numpy", "native", "jax", "torch", "mlx", "array-api-strict", "array-api-strict:device1")


ON_A_GPU = ("cupy", "jax:gpu", "torch:cuda")


# CI names here the libraries that must not be skipped, because a skip is easily taken for a pass.
REQUIRED = os.environ.get("GPT_XP_TEST_REQUIRE", "numpy").split(",")


def make_backend(name: str, dtype: str = "float32") -> Backend:
    """Return the backend called "name" or "name:device". Skip the test, with the reason, if it cannot be used."""
    library, _, device = name.partition(":")
    with skipping_what_is_missing(library):
        return get_backend(library, device=device or None, dtype=dtype)


@contextlib.contextmanager
def skipping_what_is_missing(library: str) -> Iterator[None]:
    """Skip the test, with the reason, if the library cannot be used; fail the test if the library is required."""
    try:
        yield
    except (BackendError, ModuleNotFoundError) as error:
        if library in REQUIRED:
            pytest.fail(f"{library} is required here: {error}")
        pytest.skip(str(error))


def quantized(backend: Backend) -> Backend:
    """Return the backend that takes quantized weights. Skip the test, with the reason, if numba is missing."""
    with skipping_what_is_missing("numba" if backend.name == "numpy" else backend.name):
        return quantized_backend(backend)


def in_blocks(backend: Backend, **changes: Any) -> Backend:
    def one_after_another(step: Callable[[Any], Any], state: Any, k: int) -> Any:
        choices = []
        for _ in range(k):
            state, choice = step(state)
            choices.append(choice)
        return state, Choice(*map(backend.xp.stack, zip(*choices, strict=True)))

    own = jax_backend.on_accelerators() if backend.name == "jax" else {"decode_block": one_after_another}
    return backend.replace(**own | changes)
