"""Runs the command `gpt-xp` as `python -m gpt_xp`."""

from gpt_xp.cli import main

main()
