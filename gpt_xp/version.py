"""The version of gpt-xp."""

__version__ = "0.1.0"
