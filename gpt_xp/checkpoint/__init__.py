"""Read and write models: config, weights, and tokenizer files."""
