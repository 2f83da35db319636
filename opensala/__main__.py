"""`python -m opensala` is the `opensala` command."""

from .cli import main

main()
