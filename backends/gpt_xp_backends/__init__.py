"""The adapters that come with gpt-xp: one file, one array library."""
