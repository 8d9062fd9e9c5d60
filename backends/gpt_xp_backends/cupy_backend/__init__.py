"""CuPy, on CUDA GPUs. Importing this package imports no CuPy."""

from gpt_xp_backends.cupy_backend.adapter import CuPyBackend

__all__ = ["CuPyBackend"]
