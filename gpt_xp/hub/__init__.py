"""Find models by name, and fetch published ones."""
