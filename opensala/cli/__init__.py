"""The command line. `opensala.cli:main` is the `opensala` command; nothing else imports this package."""

from .commands import app
from .entry import main

__all__ = ["app", "main"]
