"""Byte-level BPE: encoding, files, training."""
