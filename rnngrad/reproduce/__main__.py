"""``python -m rnngrad.reproduce`` is ``rnngrad-reproduce``."""

from rnngrad.reproduce.command import main

if __name__ == "__main__":
    main()
