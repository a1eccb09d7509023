"""`python -m profkit`."""

from profkit.cli import main

main()
