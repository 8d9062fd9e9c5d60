"""The adapters that come with gpt-xp: one adapter for each array library."""
