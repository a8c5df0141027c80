"""`python -m astrai`."""

from astrai.cli import main

main()
