"""``python -m rnngrad.report``."""

from rnngrad.report import main

if __name__ == "__main__":
    main()
