"""``python -m rnngrad.reproduce`` is ``rnngrad-reproduce``."""

from rnngrad.reproduce.command import main

main()
