"""Log-probabilities, perplexity and ranking."""
