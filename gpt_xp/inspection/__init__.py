"""Looking inside the model: its named intermediates."""
