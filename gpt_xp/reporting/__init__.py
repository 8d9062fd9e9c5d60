"""Text, tables and plots for people."""
