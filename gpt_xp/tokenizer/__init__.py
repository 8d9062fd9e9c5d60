"""Byte-level BPE: encode text, read and write its files, and train it."""
