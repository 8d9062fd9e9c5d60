"""Bulk jobs: many prompts, cut into shards that workers compute and rename into place."""
