"""`python -m tsgb` is the command `tsgb`."""

from .cli import main

if __name__ == "__main__":  # a bench's other processes import this file too
    main()
