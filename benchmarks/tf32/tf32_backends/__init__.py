"""Backends that let a GPU round float32 products to TF32, as other programs do by default. gpt-xp's own never do.

They show what that costs (`benchmarks/agreement.py`). The folder is laid out as pip installs a package, so it is found
when it is on PYTHONPATH.
"""

import functools
from collections.abc import Callable
from typing import Any

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
