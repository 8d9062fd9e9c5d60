"""`python -m gpt_xp` is `gpt-xp`."""

from gpt_xp.cli import main

main()
