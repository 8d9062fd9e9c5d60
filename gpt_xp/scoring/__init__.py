"""Scoring: cut a text into windows, compute the log-probability of each token, and rank continuations."""
