"""Finding models by name, and fetching published ones."""
