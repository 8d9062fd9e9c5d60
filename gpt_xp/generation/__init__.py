"""Generation: prefill, decode, sampling, speculation."""
