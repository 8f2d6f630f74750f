"""`python -m tsgb` is the command `tsgb`."""

from .cli import main

main()
