"""Backends that let a GPU round float32 products to TF32, as other programs do by default. gpt-xp's own never do.

They show what that costs (`benchmarks/agreement.py`). The folder is laid out as pip installs a package, so it is found
when it is on PYTHONPATH.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from gpt_xp_backends.cupy_backend import CuPyBackend
from gpt_xp_backends.jax_backend import JaxBackend
from gpt_xp_backends.torch_backend import TorchBackend


class JaxTF32(JaxBackend):
    """JAX with products in TF32."""

    name = "jax-tf32"

    def compile(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """Compile the function with TF32 allowed inside it."""
        import jax

        @functools.wraps(function)
        def rounded(*inputs: Any, **more: Any) -> Any:
            with jax.default_matmul_precision("tensorfloat32"):
                return function(*inputs, **more)

        return super().compile(rounded, *args, **options)


class TorchTF32(TorchBackend):
    """PyTorch with products in TF32."""

    name = "torch-tf32"

    def compile(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """Compile the function with TF32 allowed inside it."""
        import torch

        @functools.wraps(function)
        def rounded(*inputs: Any, **more: Any) -> Any:
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # The backend restores it afterwards.
            return function(*inputs, **more)

        return super().compile(rounded, *args, **options)


class CuPyTF32(CuPyBackend):
    """CuPy with cuBLAS's products in TF32. gpt-xp's own kernels, which decode, compute in float32 all the same."""

    name = "cupy-tf32"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        os.environ["CUPY_TF32"] = "1"  # CuPy reads it at its first product, in the process of this backend alone.

    def settings(self) -> dict[str, str]:
        """Return CuPy's settings, with TF32 among them."""
        return super().settings() | {"tf32": "yes"}
