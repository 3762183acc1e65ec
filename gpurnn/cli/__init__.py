"""The command line: the only place that prints. Each command has a file, which is imported when it is called."""

from .root import main

__all__ = ["main"]
