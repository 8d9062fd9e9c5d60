"""The backend `native`: NumPy's arrays, and kernels compiled for this processor."""

from gpt_xp_backends.native_backend.adapter import NativeBackend

__all__ = ["NativeBackend"]
