"""Reading and writing models: config, weights, tokenizer files."""
