"""GPT-2, written once against the Python array API standard."""

__version__ = "0.1.0"
